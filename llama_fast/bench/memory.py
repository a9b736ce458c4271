"""The most memory that this process has held, and what one call adds to it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

try:
    from .. import _cpu
except ImportError:
    _cpu = None

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_HIGHEST_IS_NOW = "5"  # what proc(5) has one write there


def resident_peak() -> int:
    """Bytes of the most memory that this process has held."""
    if _STATUS.exists():  # getrusage counts the parent's memory at the fork, too
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes that a call holds at its peak beyond what was held before, its results among them.

    On a GPU what torch allocates there. On the CPU the pages that the process gains, the scratch
    of every library among them; None where the system cannot say, which is anything but Linux. The
    call should have run before, so that what it sets up once is not counted. There `resident_peak`
    begins anew.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What allocators keep of earlier calls would be used again and not be seen.
        if _cpu is not None:
            _cpu.free_idle_blocks()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text(_HIGHEST_IS_NOW)
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes."""
    return int(_STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024
