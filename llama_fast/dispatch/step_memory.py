"""What kernels keep for a captured step: memory that all its replays share and nothing else uses.

A replay runs on whichever stream is current, so what belongs to a stream must not be in a step that
is captured; and what is made while it is captured is made anew in each replay.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_memory: ContextVar[dict[Hashable, Tensor] | None] = ContextVar("llama_fast_step", default=None)
# Of the step that is warmed up or captured here, by what it is for; None elsewhere.
step_memory = _memory.get


@contextmanager
def keep_step_memory(memory: dict[Hashable, Tensor]) -> Iterator[None]:
    """Inside the block, this is the step's; the caller keeps it as long as the step is replayed."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)
