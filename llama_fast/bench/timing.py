"""Interleaved timing: every baseline once a round, so a machine whose speed drifts is fair.

On a GPU a call is timed between two events, with nothing of its tensors left in the L2 cache, and
the time that the host takes to launch it is measured apart. A run that is too noisy says so: by the
spread of its samples, and by how busy the processors were with other programs, which may slow every
sample down alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Relative spread beyond which a median says little.
TOO_NOISY = 0.10
# Part of the processors' time that other programs may take.
TOO_BUSY = 0.05
# Twice the largest L2 cache of a GPU: to write or read as much leaves nothing else in it.
FLUSHED = 256 * 2**20
MOST_FLUSHES = 50  # what takes the host longer than these is no launch


def interleaved(
    baselines: dict[str, Callable[[], object]],
    rounds: int = 5,
    pause: float = 0.0,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call by name: one warm-up, then `rounds` rounds of all in turn.

    A baseline with a method `prepare` has it called before each of its turns, untimed.

    pause    seconds of rest before each call, in which the threads of the one before go to sleep
    warm_up  False where the calls have run just now
    """
    for call in baselines.values() if warm_up else ():
        _prepare(call)
        call()
    seconds: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(rounds):
        for name, call in baselines.items():
            _prepare(call)
            time.sleep(pause)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class DeviceTimes(NamedTuple):
    """Of each baseline by name: seconds of a call on the device, and what launching it cost the
    host."""

    seconds: dict[str, list[float]]
    host: dict[str, list[float]]


def interleaved_on_gpu(
    baselines: dict[str, Callable[[], object]],
    rounds: int = 30,
    *,
    warm: bool = False,
    cuda: Any = None,
    flush: Callable[[], object] | None = None,
) -> DeviceTimes:
    """As `interleaved`, by the GPU's own clock.

    Before each call the L2 cache is emptied, so its tensors come from memory, and as often as it
    takes for the host to queue the call meanwhile: its time is then no part of the device's.

    warm   the baseline is called once more, untimed, after the flush: its tensors may be in L2
    cuda   torch.cuda, or what stands for it
    flush  what empties the cache; else it is made on the current device
    """
    if cuda is None:
        import torch

        cuda = torch.cuda
    flush = flush or _flush()
    flushes: dict[str, int] = {}
    for name, call in baselines.items():
        _prepare(call)
        call()  # the next one finds what this one has compiled and allocated
        flushes[name] = _flushes_for(call, cuda, flush)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in baselines}
    host: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(rounds):
        for name, call in baselines.items():
            before, after = (cuda.Event(enable_timing=True) for _ in range(2))
            _prepare(call)
            cuda.synchronize()  # what was prepared is no part of the time, and the queue is empty
            for _ in range(flushes[name]):
                flush()
            if warm:
                call()
                _prepare(call)
            before.record()
            start = time.perf_counter()
            call()
            host[name].append(time.perf_counter() - start)
            after.record()
            events[name].append((before, after))
    cuda.synchronize()
    seconds = {
        name: [before.elapsed_time(after) / 1e3 for before, after in pairs]  # of milliseconds
        for name, pairs in events.items()
    }
    return DeviceTimes(seconds, host)


def device_seconds(call: Callable[[], object], rounds: int = 30) -> float:
    """The median time of a call on the GPU, whose tensors come from memory."""
    return statistics.median(interleaved_on_gpu({"": call}, rounds).seconds[""])


def _flush(device: str = "cuda") -> Callable[[], object]:
    """Zeroes one buffer, which nothing else is left of in L2, and reads another: lines that were
    written and are still there would be written back at the expense of the call that is timed."""
    import torch

    written = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    read = torch.zeros(FLUSHED // 4, dtype=torch.float32, device=device)
    total = torch.empty((), dtype=torch.float32, device=device)

    def flush() -> None:
        written.zero_()
        torch.sum(read, 0, out=total)

    return flush


def _flushes_for(call: Callable[[], object], cuda: Any, flush: Callable[[], object]) -> int:
    """How many flushes outlast what launching the call takes, with half as much to spare."""
    flush()
    before, after = (cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    flush()
    after.record()
    _prepare(call)
    cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    cuda.synchronize()
    one = before.elapsed_time(after) / 1e3
    return max(1, min(MOST_FLUSHES, math.ceil(1.5 * host / one))) if one > 0 else 1


def _prepare(call: Callable[[], object]) -> None:
    prepare = getattr(call, "prepare", None)
    if prepare is not None:
        prepare()


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median over the rounds."""
    return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))


def spread(values: list[float]) -> float:
    """The distance between the quartiles as a part of the median; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


class OtherPrograms:
    """Inside the block, watches the processor time that programs other than `processes` take.

    share  afterwards: as a part of all processors' time, with what a hypervisor took for others;
           None where /proc does not say
    """

    def __init__(self, processes: list[int]) -> None:
        self.processes = processes
        self.share: float | None = None

    def __enter__(self) -> OtherPrograms:
        self._before = self._ticks()
        return self

    def __exit__(self, *exception: object) -> None:
        after = self._ticks()
        if self._before is not None and after is not None:
            elapsed, others = (now - then for now, then in zip(after, self._before, strict=True))
            self.share = max(0.0, others / elapsed) if elapsed else 0.0

    def _ticks(self) -> tuple[int, int] | None:
        """Clock ticks of all processors so far, and those of others among them."""
        try:
            with open("/proc/stat") as file:
                user, nice, system, idle, wait, irq, soft, steal = map(
                    int, file.readline().split()[1:9]
                )
            own = sum(_ticks_of(process) for process in self.processes)
        except (OSError, ValueError):
            return None
        busy = user + nice + system + irq + soft + steal
        return busy + idle + wait, busy - own


def _ticks_of(process: int) -> int:
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
