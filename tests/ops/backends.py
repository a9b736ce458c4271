"""The backends that the op tests run, and how a test asks for one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from llama_fast.backends import cpu, cuda, triton
from llama_fast.dispatch import use_backend

from ..cpu_host import emulation
from ..cuda_host import host

EMULATED = " (emulated)"
CUDA_HOST = "cuda-host"

GPU = torch.cuda.is_available()


def unless(reason: str) -> list:
    """Marks that skip for this reason, if there is one."""
    return [pytest.mark.skip(reason=reason)] if reason else []


def emulated(isa: str):
    """`isa` as a backend that runs emulated, where this CPU lacks it."""
    return pytest.param(f"cpu-{isa}{EMULATED}", marks=unless(emulation.why_not(isa)))


# Tested where they differ from others: cpu_host/test_avx_vnni.py, and test_amx.py and PRODUCTS.
ELSEWHERE = (emulation.AVX_VNNI, emulation.AMX)
# "eager", "cpu-<instruction set>" for those of this CPU, and those that are emulated here; "triton"
# on the GPU, or in its interpreter; "cuda" on the GPU, and its kernels on the host.
BACKENDS = [
    "eager",
    *(f"cpu-{isa}" for isa in cpu.isas() if isa not in ELSEWHERE),
    *map(emulated, emulation.AVX512),
    pytest.param(
        "triton",
        marks=unless("" if GPU or triton.INTERPRETED else "this needs a GPU, or its interpreter"),
    ),
    pytest.param(
        "cuda",
        marks=unless("" if GPU and cuda._cuda else "this needs a GPU, and llama_fast._cuda built"),
    ),
    pytest.param(CUDA_HOST, marks=unless(host.why_not())),
]
# With the one whose matrix products are made by tile registers.
PRODUCTS = [
    *BACKENDS,
    "cpu-amx" if emulation.AMX in cpu.isas() else emulated(emulation.AMX),
]


def name_of(backend: object) -> str:
    """The name in an entry of BACKENDS."""
    return backend if isinstance(backend, str) else backend.values[0]


def device(backend: str) -> str:
    """Where the tensors lie that `backend`, one of BACKENDS, is tested on."""
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


def on(backend: str) -> ExitStack:
    """Inside the block, ops run on `backend`, one of BACKENDS, or raise."""
    stack = ExitStack()
    name, _, isa = backend.partition("-")
    if backend == CUDA_HOST:
        stack.enter_context(host.use_host())
    elif isa.endswith(EMULATED):
        stack.enter_context(emulation.use_isa(isa.removesuffix(EMULATED)))
    elif isa:
        stack.enter_context(cpu.use_isa(isa))
    stack.enter_context(use_backend(name, strict=True))
    return stack
