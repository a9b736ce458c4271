"""Seeing the launches of ops one by one, and the clocks that time them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..dispatch import Op


class HostClock:
    """For a CPU, where a call has ended when it returns."""

    now = staticmethod(time.perf_counter)

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        pass


class DeviceClock:
    """For a GPU: events in the stream, between which lies what the device took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


class Observer:
    """Sees every launch that is not made by another: `wrapped_launches(observer.launch)`."""

    inside = False

    def launch(self, op: Op, backend: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def launched(*args: Any) -> Any:
            if not self.watches() or self.inside:
                return launch(*args)
            self.inside = True
            try:
                return self.see(op, backend, launch, args)
            finally:
                self.inside = False

        return launched

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Inside the block launches are a part of something that is seen already."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def watches(self) -> bool:
        """Whether launches of the current thread are to be seen."""
        return True

    def see(self, op: Op, backend: str, launch: Callable[..., Any], args: tuple) -> Any:
        raise NotImplementedError
