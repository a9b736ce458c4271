"""Interleaved timing: every contender once a round, so a machine whose speed drifts is fair.

A run that is too noisy says so: by the spread of its samples, and by how busy the processors were
with other programs, which may slow every sample down alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# Relative spread beyond which a median says little.
TOO_NOISY = 0.10
# Part of the processors' time that other programs may take.
TOO_BUSY = 0.05


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int = 5, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call by name: one warm-up, then `rounds` rounds of all in turn.

    pause  seconds of rest before each call, in which the threads of the one before go to sleep
    """
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(pause)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


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
