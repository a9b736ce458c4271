"""What each call of an op took, and what it had to move and compute.

The steps are timed by two stamps around each launch and nothing else. Costs are counted in a step
of their own, so that counting is in no time; the calls of all steps are the same, in one order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Cost, Op, wrapped_launches
from ...inspect.launches import DeviceClock, HostClock, Observer, clock_of
from ..measure import at_best
from ..roofline import Roofline
from ..timing import spread

# A part of a step that is no op of ours, in a `with`: its name, and what it must move and compute.
Section = Callable[[str, Cost], AbstractContextManager]
# Some work, done once: decoding a token, say.
Step = Callable[[Section], None]


@dataclass(frozen=True)
class Call:
    """shapes   of the tensors that it was given, those of one dim left out
    bound    what bounds it: "read", "copy", "float32", "bfloat16" or "int8"
    least    seconds that it takes at that peak rate; None where that was not measured
    """

    op: str
    backend: str
    shapes: str
    bytes: int
    flops: int
    bound: str
    least: float | None


@dataclass
class Row:
    """The calls of one kind together. share_of_peak: None where the peak rate is not known."""

    op: str
    backend: str
    shapes: str
    calls: int
    seconds: float
    bytes: int
    flops: int
    bound: str
    share_of_peak: float | None


@dataclass
class Profile:
    """calls    of one step
    seconds  of each step as a whole
    parts    of each step, the seconds of each of its calls
    """

    calls: list[Call]
    seconds: list[float]
    parts: list[list[float]]

    @property
    def median(self) -> int:
        """Which step took the median time (the lower one of two)."""
        order = sorted(range(len(self.seconds)), key=self.seconds.__getitem__)
        return order[(len(order) - 1) // 2]

    @property
    def step(self) -> float:
        """Seconds of the median step: `rows` and `rest` are its parts."""
        return self.seconds[self.median]

    @property
    def spread(self) -> float:
        return spread(self.seconds)

    @property
    def rest(self) -> float:
        """Seconds of the median step that no call accounts for: torch's own ops, Python, and on a
        GPU the time between kernels."""
        return self.step - sum(self.parts[self.median])

    def rows(self, by_shape: bool = False) -> list[Row]:
        """Of the median step, those that took longest first."""
        kinds: dict[tuple, list[tuple[Call, float]]] = {}
        for call, seconds in zip(self.calls, self.parts[self.median], strict=True):
            kind = (call.op, call.backend, call.shapes if by_shape else "")
            kinds.setdefault(kind, []).append((call, seconds))
        rows = []
        for (op, backend, shapes), found in kinds.items():
            seconds = sum(s for _, s in found)
            least = [call.least for call, _ in found]
            rows.append(
                Row(
                    op=op,
                    backend=backend,
                    shapes=shapes,
                    calls=len(found),
                    seconds=seconds,
                    bytes=sum(call.bytes for call, _ in found),
                    flops=sum(call.flops for call, _ in found),
                    bound=", ".join(sorted({call.bound for call, _ in found})),
                    share_of_peak=None if None in least else sum(least) / seconds,
                )
            )
        return sorted(rows, key=lambda row: -row.seconds)


def profile(
    step: Step,
    repeats: int,
    roofline: Roofline,
    device: torch.device,
    around: AbstractContextManager | None = None,
) -> Profile:
    """Runs the step twice untimed, to warm up and to count costs, and `repeats` times timed.

    around  entered before the timed steps and left after them, as `Counters`
    """
    step(no_section)
    calls = count(step, roofline)
    clock = clock_of(device)
    watch = _Watch(clock)
    steps = []
    with wrapped_launches(watch.launch), around or nullcontext():
        for _ in range(repeats):
            watch.stamps = []
            start = clock.now()
            step(watch.section)
            steps.append((start, clock.now(), watch.stamps))
        clock.wait()
    return Profile(
        calls,
        [clock.seconds(start, end) for start, end, _ in steps],
        [[clock.seconds(*stamps) for stamps in parts] for *_, parts in steps],
    )


def seconds_of(call: Callable[[], None], repeats: int, device: torch.device) -> list[float]:
    """Of each of `repeats` calls, after three that are not timed."""
    for _ in range(3):
        call()
    clock = clock_of(device)
    stamps = [clock.now()]
    for _ in range(repeats):
        call()
        stamps.append(clock.now())
    clock.wait()
    return [clock.seconds(start, end) for start, end in itertools.pairwise(stamps)]


def count(step: Step, roofline: Roofline) -> list[Call]:
    """The calls of one step, with what each must move and compute."""
    counter = _Counter(roofline)
    with wrapped_launches(counter.launch):
        step(counter.section)
    return counter.calls


def no_section(name: str, cost: Cost) -> AbstractContextManager:
    return nullcontext()


class _Watch(Observer):
    def __init__(self, clock: HostClock | DeviceClock) -> None:
        self.now = clock.now
        self.stamps: list[tuple] = []

    def see(self, op: Op, backend: str, launch: Callable[..., Any], args: tuple) -> Any:
        start = self.now()
        results = launch(*args)
        self.stamps.append((start, self.now()))
        return results

    @contextmanager
    def section(self, name: str, cost: Cost) -> Iterator[None]:
        start = self.now()
        with self.as_one():
            yield
        self.stamps.append((start, self.now()))


class _Counter(Observer):
    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        self.calls: list[Call] = []

    def see(self, op: Op, backend: str, launch: Callable[..., Any], args: tuple) -> Any:
        results = launch(*args)
        least = op.cost(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        dtype = next(x.dtype for x in tensors if x.is_floating_point())
        written = (results,) if isinstance(results, Tensor) else tuple(results)
        bound, seconds = at_best(args, least, written, dtype, self.roofline)
        shapes = ", ".join("×".join(map(str, x.shape)) for x in tensors if x.ndim > 1)
        self.calls.append(Call(op.label(*args), backend, shapes, *least, bound, seconds))
        return results

    @contextmanager
    def section(self, name: str, cost: Cost) -> Iterator[None]:
        with self.as_one():
            yield
        copy = self.roofline.copy
        self.calls.append(
            Call(name, "torch", "", *cost, "copy", cost.bytes / copy if copy else None)
        )
