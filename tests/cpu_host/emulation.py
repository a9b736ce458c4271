"""The kernels of instruction sets that this CPU lacks, run all the same: see docs/testing.md."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from llama_fast.backends import cpu
from llama_fast.dispatch import OPS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Those of AVX-512 are tested as backends, avx_vnni where it differs from avx2 (test_avx_vnni.py).
AVX512 = ("avx512_bf16", "avx512")
AVX_VNNI = "avx_vnni"
# Tested where it differs from avx512_bf16: in the products of matrices.
AMX = "amx"
MISSING = re.compile(r"inlining failed in call to .*?(_mm\w+)\(.*target specific option mismatch")


def load_module(name: str, path: Path) -> ModuleType:
    """The Python or extension module in the file `path`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_module("llama_fast_setup", ROOT / "setup.py")
CXX = sysconfig.get_config_var("CXX").split()[0]
CXX_FLAGS = f"-I{HERE} {setup.X86_64_FLAGS['avx2']} -Wno-psabi"
# Few cases run on avx_vnni and amx, so their time goes into compiling.
ISA_FLAGS = {
    AMX: f"-DISA_AVX512_BF16 {CXX_FLAGS} -O1",
    **dict.fromkeys(AVX512, f"{CXX_FLAGS} -O2"),
    AVX_VNNI: f"-DISA_AVX2 {CXX_FLAGS} -O0",
}
# The module believes that the CPU has every instruction set that it was built for.
ANY_CPU = "'-D__builtin_cpu_supports(isa)=true' -DMAY_USE_TILES=true"


def why_not(isa: str) -> str:
    """The reason not to emulate `isa` here, or nothing."""
    if isa in cpu.isas():
        return f"this CPU has {isa}: the kernels run on the instructions themselves"
    return why_no_x86_compiler()


def why_no_x86_compiler() -> str:
    """The reason why no program for x86-64 with AVX2 can be built and run here, or nothing."""
    if "avx2" not in cpu.isas():
        return "this needs an x86-64 CPU with AVX2, FMA and F16C"
    if not re.search(r"(^|-)g\+\+", Path(CXX).name) or shutil.which(CXX) is None:
        return f"this needs g++; the compiler here is {CXX}"
    return ""


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Inside the block, the CPU kernels are those of instruction set `isa`, emulated."""
    real, cpu._cpu = cpu._cpu, module()
    # Launchers that the ops have kept are those of the module before.
    forget_launchers()
    try:
        with cpu.use_isa(isa):
            yield
    finally:
        cpu._cpu = real
        forget_launchers()


def use_isa_anyhow(isa: str) -> AbstractContextManager[None]:
    """The same, on the instructions themselves where this CPU has them."""
    return (cpu.use_isa if isa in cpu.isas() else use_isa)(isa)


def forget_launchers() -> None:
    for op in OPS.values():
        op.forget_order()


@functools.cache
def module() -> ModuleType:
    target, failure = build()
    if failure:
        pytest.fail(failure, pytrace=False)
    return load_module("emulated._cpu", target)


@functools.cache
def build() -> tuple[Path, str]:
    """Builds the module of what this CPU lacks, incrementally → its file, and what went wrong or
    nothing."""
    lacking = {isa: flags for isa, flags in ISA_FLAGS.items() if isa not in cpu.isas()}
    folder = ROOT / "build" / "emulated"
    target = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock"):  # every worker of pytest-xdist comes here at once
            setup.build_cpu_module(target, folder, lacking, f"-O0 {ANY_CPU}")
    except subprocess.CalledProcessError as error:
        again = subprocess.run([*error.cmd, "-k", "0"], capture_output=True, text=True)
        missing = sorted(set(MISSING.findall(again.stdout)))
        if missing:
            return target, f"add to {HERE / 'immintrin.h'}: {', '.join(missing)}"
        return target, f"the kernels do not compile with {HERE / 'immintrin.h'}:\n{again.stdout}"
    return target, ""
