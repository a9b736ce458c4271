"""The oracle itself: it finds wrong kernels, lets sound ones pass, and says the same everywhere."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .oracle import assert_accurate, copies
from .verdicts import verdicts
from .wrong_kernels import FAULTS, judged_by

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        pytest.param(fault, dtype, id=f"{fault}-{str(dtype)[6:]}")
        for fault in FAULTS
        for dtype in fault.dtypes
    ],
)
def test_a_fault_is_found_and_a_sound_kernel_passes(fault, dtype):
    op, args, wanted = judged_by(fault.kernel, fault.case, dtype)
    assert_accurate(fault.kernel("", *copies(args)), wanted, op.name)
    with pytest.raises(AssertionError, match=op.name):
        assert_accurate(fault.kernel(fault.name, *copies(args)), wanted, op.name)


@functools.cache
def verdicts_here(dtype: torch.dtype) -> dict[str, dict]:
    return verdicts(dtype)


# Name → variables of torch, oneDNN and MKL. Torch runs what it is told to, whether or not the CPU
# has the instructions.
WAYS = {
    "threads": {},
    "blocked": {},
    "scalar": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


@functools.cache
def verdicts_there(dtype: torch.dtype, asked: str) -> dict[str, dict]:
    """Those of a way. The ways that are told the same variables share a process."""
    same = [way for way in WAYS if WAYS[way] == WAYS[asked]]
    if asked != same[0]:
        return verdicts_there(dtype, same[0])
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.verdicts", str(dtype)[6:], *same],
        cwd=ROOT, env=os.environ | WAYS[asked], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


CAPABILITIES = ("default", "avx2", "avx512")
HALF = [pytest.param(t, marks=pytest.mark.thorough) for t in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_verdicts_are_the_same_however_torch_computes(way, dtype):
    here = torch.backends.cpu.get_cpu_capability().lower()
    needed = WAYS[way].get("ATEN_CPU_CAPABILITY", "default")
    if CAPABILITIES.index(needed) > CAPABILITIES.index(here):
        pytest.skip(f"torch takes {here} here: this needs a CPU with {needed}")
    there, ours = verdicts_there(dtype, way)[way], verdicts_here(dtype)
    assert there.keys() == ours.keys()
    for name, of in ours.items():
        assert of["eager"] and of["sound"] and not of["faulty"], name
        for kernel in ("eager", "sound", "faulty"):
            assert there[name][kernel] == of[kernel], f"{name}: {kernel}"
        assert there[name]["allowed"] == pytest.approx(of["allowed"], rel=1e-4), name
