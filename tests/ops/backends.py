"""The backends that the op tests run, and how a test asks for one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from llama_fast.backends import cpu
from llama_fast.registry import use_backend

from ..cpu_host import emulation

EMULATED = " (emulated)"

# "eager", "cpu-<instruction set>" for those of this CPU, and those that are emulated here.
BACKENDS = [
    "eager",
    *(f"cpu-{isa}" for isa in cpu.isas()),
    *(
        pytest.param(
            f"cpu-{isa}{EMULATED}",
            marks=[pytest.mark.skip(reason=reason)] if (reason := emulation.why_not(isa)) else [],
        )
        for isa in emulation.ISAS
    ),
]


def on(backend: str) -> ExitStack:
    """Inside the block, ops run on `backend`, one of BACKENDS, or raise."""
    stack = ExitStack()
    name, _, isa = backend.partition("-")
    if isa.endswith(EMULATED):
        stack.enter_context(emulation.use_isa(isa.removesuffix(EMULATED)))
    elif isa:
        stack.enter_context(cpu.use_isa(isa))
    stack.enter_context(use_backend(name, strict=True))
    return stack
