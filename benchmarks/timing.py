"""Interleaved timing: every contender once a round, so a machine whose speed drifts is fair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

# Relative spread beyond which a median says little.
TOO_NOISY = 0.10


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
