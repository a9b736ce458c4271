"""How fast each backend serves an op, beside the eager reference and the machine's ceilings.

The backends take turns, round by round. The arguments change from call to call, so that they come
from memory as they do in a model, unless they are to be warm. An output that is not the reference's
is an error, not a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ceilings import BYTES, Ceilings
from .errors import WrongResultError
from .registry import OPS, Cost, Op, use_backend
from .timing import TOO_BUSY, TOO_NOISY, OtherPrograms, interleaved, ratio, spread
from .workloads import Work

SAMPLE = 0.02  # seconds that one sample takes at least, in as many calls as that needs
SETS = 64  # of arguments, at most
# Of an output's own root mean square, by the dtype: rounding, not another result.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass
class Speed:
    """One backend's measurement.

    samples   seconds of one call, a value a round
    bytes, flops   what a call must move and compute at least
    ceiling   "read", "copy", "float32", "bfloat16" or "int8": what bounds the call
    share     how near it comes to that ceiling; None where it was not measured
    error     distance from the eager reference, relative to its size (root mean squares)
    others    part of the processors' time that other programs took meanwhile
    times_eager  how many times faster than the eager reference; None where that was not timed
    """

    workload: str
    shape: str
    work: str
    dtype: str
    backend: str
    samples: list[float]
    bytes: int
    flops: int
    ceiling: str
    share: float | None
    error: float
    others: float | None
    times_eager: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def too_noisy(self) -> bool:
        return spread(self.samples) > TOO_NOISY or (self.others or 0) > TOO_BUSY

    def record(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "median": self.median,
            "spread": spread(self.samples),
            "bytes_per_second": self.bytes / self.median,
            "flops_per_second": self.flops / self.median,
            "too_noisy": self.too_noisy,
        }


def why_not(op: Op, args: tuple, name: str) -> list[str]:
    """Why a backend cannot serve the call, in sentences; nothing where it can."""
    with use_backend(name):
        return op.explain(*args).reasons[name]


def measure(
    workload: str,
    make: Callable[[int], tuple],
    names: list[str],
    *,
    shape: str,
    work: Work,
    ceilings: Ceilings,
    rounds: int = 5,
    warm: bool = False,
) -> list[Speed]:
    """Times the backends on one of `llama_fast.workloads`; all of them must serve it.

    warm  the same arguments in every call, so that they may lie in a cache
    Raises WrongResultError for an output that is not the eager reference's.
    """
    op = OPS[workload.split()[0]]
    first = make(0)
    floats = next(x for x in first if isinstance(x, Tensor) and x.is_floating_point())
    least = op.cost(*first)
    sets = 1 if warm else max(1, min(SETS, BYTES // max(1, least.bytes)))
    inputs = [first, *(make(seed) for seed in range(1, sets))]
    with torch.no_grad():
        expected = outputs(op, op.eager(*make(0)))  # an op may write its arguments
        errors = {name: _error(op, name, make(0), expected, floats.dtype) for name in names}
        calls = {name: _Sample(op, name, inputs) for name in names}
        with OtherPrograms([os.getpid()]) as others:
            seconds = interleaved(calls, rounds)
    bound, least_seconds = at_best(op, least, expected, floats.dtype, ceilings)
    found = []
    for name in names:
        samples = [value / calls[name].count for value in seconds[name]]
        found.append(
            Speed(
                workload=workload,
                shape=shape,
                work=str(work),
                dtype=str(floats.dtype).removeprefix("torch."),
                backend=name,
                samples=samples,
                bytes=least.bytes,
                flops=least.flops,
                ceiling=bound,
                share=None if least_seconds is None else least_seconds / statistics.median(samples),
                error=errors[name],
                others=others.share,
                times_eager=ratio(seconds, "eager", name) * calls[name].count / calls["eager"].count
                if "eager" in calls
                else None,
            )
        )
    return found


class _Sample:
    """As many calls as take SAMPLE seconds, each with the next arguments."""

    def __init__(self, op: Op, backend: str, inputs: list[tuple]) -> None:
        self.op, self.backend = op, backend
        self.next = itertools.cycle(inputs).__next__
        self.count, seconds = 1, 0.0
        while True:
            start = time.perf_counter()
            self()
            seconds = time.perf_counter() - start
            if seconds >= SAMPLE:
                break
            self.count = max(2 * self.count, int(self.count * SAMPLE / seconds))

    def __call__(self) -> None:
        with use_backend(self.backend, strict=True):
            for _ in range(self.count):
                args = self.next()
                self.op(*args)
        if not args[0].is_cpu:
            torch.cuda.synchronize(args[0].device)


def outputs(op: Op, found: Any) -> tuple[Tensor, ...]:
    """Those that the op is for, not those that only its gradient needs."""
    if isinstance(found, Tensor):
        return (found,)
    return tuple(found)[: len(found) - op.auxiliary]


def distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the farthest output: the root mean square of the difference, relative to that of what is
    expected."""
    return max(
        ((one.double() - other.double()).norm() / other.double().norm()).item()
        for one, other in zip(found, expected, strict=True)
    )


def _error(
    op: Op, name: str, args: tuple, expected: tuple[Tensor, ...], dtype: torch.dtype
) -> float:
    if name == "eager":
        return 0.0
    with use_backend(name, strict=True):
        error = distance(outputs(op, op(*args)), expected)
    if not error <= TOLERANCE[dtype]:
        raise WrongResultError(
            f"{op.name} on {name} is {error:.2g} of its size away from the eager reference; "
            f"at most {TOLERANCE[dtype]:g} is rounding, so its time means nothing"
        )
    return error


def at_best(
    op: Op,
    least: Cost,
    results: tuple[Tensor, ...],
    dtype: torch.dtype,
    ceilings: Ceilings,
) -> tuple[str, float | None]:
    """The ceiling that bounds a call, and the seconds that it takes there.

    What writes much is bounded by a copy, what hardly writes by a read. The rate of 8-bit
    multiply-adds is not among the ceilings: a call of quantised weights that it would bound has
    none.
    """
    written = sum(result.numel() for result in results) * dtype.itemsize
    memory = "copy" if written > least.bytes / 4 else "read"
    arithmetic = "bfloat16" if dtype is torch.bfloat16 else "float32"
    bandwidth, rate = getattr(ceilings, memory), getattr(ceilings, arithmetic)
    moving = least.bytes / bandwidth if bandwidth else None
    computing = least.flops / rate if rate else None
    if computing is None or moving is None or moving >= computing:
        return memory, moving
    if op.name == "linear_quantized":
        return "int8", None
    return arithmetic, computing
