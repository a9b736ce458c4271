"""torch's profiler over one step: a trace for Chrome's or Perfetto's viewer, and what torch itself
spends between the ops."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function

from ...dispatch import Cost, Op, wrapped_launches
from ...utils.files import atomic_file
from .calls import Step


class TorchOp(NamedTuple):
    """One of torch's own ops, called outside of ours: seconds of all its calls, of the device where
    that is a GPU."""

    name: str
    calls: int
    seconds: float


def write_trace(step: Step, path: Path, device: torch.device) -> list[TorchOp]:
    """Profiles one step, in which every op stands as "name [backend]", and writes the trace.

    Returns torch's ops outside of ours, those that took longest first. The profiler slows small
    ops down: these times are for comparison with each other.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _without_kineto_notes():
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            with wrapped_launches(_named):
                step(_section)
            if on_gpu:
                torch.cuda.synchronize(device)
    with atomic_file(path) as partial:
        profiler.export_chrome_trace(str(partial))
    return outside(profiler.events(), on_gpu)


@contextmanager
def _without_kineto_notes() -> Iterator[None]:
    """Some builds of torch tell stderr when the profiler starts and stops, past Python: those lines
    are left out, others are passed on."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = [line for line in file if not line.startswith(b"USDT:")]
            os.write(2, b"".join(lines))


def _section(name: str, cost: Cost) -> AbstractContextManager:
    return record_function(f"{name} [torch]")


def _named(op: Op, backend: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    name = f"{op.name} [{backend}]"

    def launched(*args: Any) -> Any:
        with record_function(name):
            return launch(*args)

    return launched


def outside(events: list[Any], on_gpu: bool) -> list[TorchOp]:
    """The outermost of torch's ops that none of ours called."""
    found: dict[str, list[float]] = {}
    for root in events:
        if root.cpu_parent is None:
            for event in _outermost(root):
                total = event.device_time_total if on_gpu else event.cpu_time_total
                found.setdefault(event.name, []).append(total / 1e6)
    rows = [TorchOp(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _outermost(event: Any) -> Iterator[Any]:
    """Ops of aten in the tree below an event: not below another of them, nor below one of ours."""
    if event.name.endswith("]") and not event.name.startswith("aten::"):
        return
    if event.name.startswith("aten::"):
        yield event
        return
    for child in event.cpu_children:
        yield from _outermost(child)
