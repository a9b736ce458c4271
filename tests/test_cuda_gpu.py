"""The CUDA kernels on a GPU: what must be asked for there, and the ops' small cases under
compute-sanitizer, once with each tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast.backends import cuda
from llama_fast.dispatch import OPS, use_backend

from .ops.oracle import assert_accurate, of_op, run_poisoned
from .test_cuda import OF_DECODING

ROOT = Path(__file__).parent.parent
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "/usr/local/cuda/bin/compute-sanitizer"
)
# Of each op, what has odd sizes, several blocks and little work.
CASES = "odd or ragged or chunk or fused or 5 or group"

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda._cuda is None,
    reason="this needs a GPU, and llama_fast._cuda built for it",
)


@pytest.mark.parametrize("setting", ["WARPGROUPS", "OVERLAP"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_must_be_asked_for(setting, dtype, monkeypatch):
    """On an sm_90 the kernel with wgmma, and kernels that overlap; elsewhere nothing changes."""
    monkeypatch.setattr(cuda, setting, True)
    for name in OF_DECODING:
        op = OPS[name]
        for case in op.cases():
            args = case.make(torch.Generator().manual_seed(0), dtype, "cuda")
            if op.explain(*args).reasons["cuda"]:
                continue
            with use_backend("cuda", strict=True):
                actual = run_poisoned(op, args)
            assert_accurate(actual, of_op(op, args), f"{name} {case}")


@pytest.mark.skipif(SANITIZER is None, reason="this needs compute-sanitizer, of CUDA's toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    tests = [sys.executable, "-m", "pytest", "-q", "--all", "tests/ops/test_ops.py"]
    chosen = ["-k", f"test_forward and bfloat16-cuda and not cuda-host and ({CASES})"]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *tests, *chosen]
    # torch's own allocator would hide an access beyond a tensor within its pool.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
