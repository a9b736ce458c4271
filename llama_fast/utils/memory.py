"""The memory of this process, as the system counts it."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_peak() -> int:
    """Bytes of the most memory that this process has held."""
    if _STATUS.exists():  # getrusage counts the parent's memory at the fork, too
        return status_bytes("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_bytes(field: str) -> int:
    """Bytes of a field of /proc/self/status, which Linux alone has."""
    return int(_STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024
