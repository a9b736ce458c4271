"""The memory that one call takes beyond what was held before; and what nobody holds, given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from ..utils.memory import status_bytes

try:
    from .. import _cpu
except ImportError:
    _cpu = None

_CLEAR = Path("/proc/self/clear_refs")
_HIGHEST_IS_NOW = "5"  # what proc(5) has one write there


def extra_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes that a call holds at its peak beyond what was held before, its results among them.

    On a GPU what torch allocates there. On the CPU the pages that the process gains, the scratch
    of every library among them; None where the system cannot say, which is anything but Linux. The
    call should have run before, so that what it sets up once is not counted. There
    `utils.memory.resident_peak` begins anew.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        give_back_idle()  # it would be used again and not be seen
        _CLEAR.write_text(_HIGHEST_IS_NOW)
    except (AttributeError, OSError):
        return None
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before)


def give_back_idle() -> None:
    """Gives the system what allocators keep of earlier calls. Raises AttributeError where the C
    library has no `malloc_trim`, as on anything but Linux."""
    if _cpu is not None:
        _cpu.free_idle_blocks()
    ctypes.CDLL(None).malloc_trim(0)
