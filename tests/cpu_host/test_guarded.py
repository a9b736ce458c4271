"""The CPU kernels stay within their tensors: between guard pages, and under AddressSanitizer and
UBSan. What ran last is the last line of what the process printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llama_fast.backends import cpu

from . import emulation

# The module under sanitizers is built for one: every source is compiled for each, and what differs
# between instruction sets is in csrc/cpu/simd.
SANITIZED = {isa: flags for isa, flags in emulation.setup.ISA_FLAGS.items() if isa == "avx2"}
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

needs_x86 = pytest.mark.skipif(
    bool(emulation.why_no_x86_compiler()), reason=emulation.why_no_x86_compiler() or "it runs"
)


def run(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.cpu_host.guarded", *arguments]
    done = subprocess.run(
        command, cwd=emulation.ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-5000:]
    assert re.search(r"^\d{3,} calls$", done.stdout, re.M), done.stdout[-1500:]


@pytest.mark.skipif(sys.platform != "linux" or not cpu.isas(), reason="this needs Linux and _cpu")
def test_between_guard_pages():
    run()


@needs_x86
def test_under_sanitizers():
    ask = [emulation.CXX, "-print-file-name=libasan.so"]
    library = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip(f"this needs AddressSanitizer's library, which {emulation.CXX} does not have")
    folder = emulation.ROOT / "build" / "cpu-sanitized"
    target = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    emulation.setup.build_cpu_module(target, folder, SANITIZED, FLAGS)
    run(
        str(target),
        LD_PRELOAD=f"{library} {library.replace('libasan', 'libubsan')}",
        # Python and torch keep what they allocate; their own code is not what is tested.
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
