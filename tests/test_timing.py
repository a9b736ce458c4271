"""The clock of a GPU, with a stand-in for one: what is timed is the call, on the device alone."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.bench import timing
from llama_fast.bench.timing import interleaved, interleaved_on_gpu


class StandIn:
    """A device that works through a queue: `now` is its clock, in seconds, and it waits for the
    host, whose clock is the real one."""

    def __init__(self) -> None:
        self.now, self.synchronized, self.cached = 0.0, 0, False
        self.log: list[str] = []

    def work(self, name: str, seconds: float, queued: float | None = None) -> None:
        """Work that the host has queued just now, or is to be queued at that time."""
        self.now = max(self.now, time.perf_counter() if queued is None else queued) + seconds
        self.log.append(name)

    def synchronize(self) -> None:
        self.synchronized += 1
        while time.perf_counter() < self.now:
            pass

    def Event(self, enable_timing: bool) -> StandIn._Event:
        assert enable_timing
        return self._Event(self)

    class _Event:
        def __init__(self, device: StandIn) -> None:
            self.device = device

        def record(self) -> None:
            self.at = max(self.device.now, time.perf_counter())

        def elapsed_time(self, other: StandIn._Event) -> float:
            return 1e3 * (other.at - self.at)


@pytest.fixture
def device():
    return StandIn()


def flush_of(device: StandIn):
    def flush() -> None:
        device.cached = False
        device.work("flush", 2e-3)

    return flush


class Kernel:
    """Takes `host` seconds to launch and 1 ms on the device, or 0.2 with its data in the cache."""

    def __init__(self, device: StandIn, name: str, host: float = 0.0) -> None:
        self.device, self.name, self.host, self.prepared = device, name, host, 0

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self) -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < self.host:
            pass
        self.device.work(self.name, 2e-4 if self.device.cached else 1e-3)
        self.device.cached = True


def test_the_cache_is_cold_and_baselines_take_turns(device):
    calls = {name: Kernel(device, name) for name in "ab"}
    times = interleaved_on_gpu(calls, 3, cuda=device, flush=flush_of(device))
    for name in "ab":
        assert times.seconds[name] == pytest.approx([1e-3] * 3, rel=0.05)
        assert len(times.host[name]) == 3 and calls[name].prepared == 5
    turns = [name for name in device.log[-6 - 6 :] if name != "flush"]
    assert turns == ["a", "b"] * 3 and device.log[-2] == "flush"


def test_warm_data_are_in_the_cache(device):
    calls = {"a": Kernel(device, "a")}
    times = interleaved_on_gpu(calls, 3, warm=True, cuda=device, flush=flush_of(device))
    assert times.seconds["a"] == pytest.approx([2e-4] * 3, rel=0.1)


def test_the_host_s_time_is_apart_however_long_it_is(device):
    """A launch that takes longer than one flush is hidden behind as many as it needs."""
    calls = {"slow to launch": Kernel(device, "a", host=8e-3)}
    times = interleaved_on_gpu(calls, 3, cuda=device, flush=flush_of(device))
    assert times.seconds["slow to launch"] == pytest.approx([1e-3] * 3, rel=0.05)
    assert min(times.host["slow to launch"]) >= 8e-3


class Traffic(TorchDispatchMode):
    """What calls have written and read, by the address of the memory: (what, address, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, x in zip(function._schema.arguments, args, strict=False):
            if isinstance(x, torch.Tensor):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                self.log.append(("write" if writes else "read", x.data_ptr(), x.nbytes))
        return function(*args, **(kwargs or {}))


def test_a_flush_leaves_no_lines_to_be_written_back(monkeypatch):
    """What it ends with is a read of as much as the cache holds, from memory it has not written."""
    monkeypatch.setattr(timing, "FLUSHED", 2**16)
    flush = timing._flush("cpu")
    with Traffic() as traffic:
        flush()
    (first, written, size), (last, read, amount) = traffic.log
    assert (first, last) == ("write", "read") and written != read
    assert size == amount == 2**16


def test_preparing_is_not_timed():
    class Slow:
        def prepare(self) -> None:
            time.sleep(0.02)

        def __call__(self) -> None:
            pass

    assert max(interleaved({"a": Slow()}, rounds=2)["a"]) < 0.01
