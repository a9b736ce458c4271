"""The memory that tensors take while something runs, counted by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_of_tensors(call: Callable[[], Any]) -> int:
    """Bytes that tensors of the CPU hold at their peak beyond what was held before, everything
    that is computed inside of torch's own operators included. Outputs of cpu.MAPPED bytes and more
    lie elsewhere and are not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    del result
    changes: list[tuple[int, int]] = []
    _take(found.profiler.kineto_results.experimental_event_tree(), changes)
    assert changes, "torch's profiler has seen no allocation"
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):  # of one moment, as they came
        held += size
        peak = max(peak, held)
    return peak


def _take(events: Iterable[Any], changes: list[tuple[int, int]]) -> None:
    for event in events:
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        _take(event.children, changes)
