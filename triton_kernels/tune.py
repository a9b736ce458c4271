"""Measures launch configurations: from the one in use, step by step to the fastest neighbour.

Only when asked (`llama-fast bench --tune`). A call of an op may launch several kernels; the choices
that it makes are found by running it, and climbed one after another, the others held. A candidate
that is refused, fails, or gives another result is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .choice import Choice, neighbours, trying
from .launch import Launch, record

GAIN = 0.02  # of its time that a step must save: less is noise
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration found, the median seconds of the call with it and with the one
    that it began with, and how many candidates were timed and passed over."""

    choice: Choice
    config: Any
    seconds: float
    default_seconds: float
    timed: int
    refused: dict[str, str]

    def row(self) -> dict[str, Any]:
        """As the files have it."""
        return {
            "kernel": self.choice.kernel,
            "shape": dict(self.choice.shape),
            "config": asdict(self.config),
            "seconds": self.seconds,
            "default_seconds": self.default_seconds,
        }


def tune(
    call: Callable[[], tuple[torch.Tensor, ...]],
    seconds: Callable[[Callable[[], Any]], float],
    refuse: Callable[[list[Launch]], str],
) -> list[Tuned]:
    """Tunes every kernel that `call` launches.

    call     returns new tensors, the same each time
    seconds  times a call
    refuse   why what a candidate would launch must not ship (spills …), or ""
    """
    with trying({}) as choices:
        expected = [x.detach().clone() for x in call()]
    begin = best = seconds(call)
    configs = dict(choices)
    found = []
    for choice in choices:
        timed, refused, known = 0, {}, {configs[choice]}
        climbing = True
        while climbing:
            climbing = False
            start = configs[choice]
            for candidate in neighbours(start):
                if candidate in known:
                    continue
                known.add(candidate)
                with trying(configs | {choice: candidate}):
                    why = _why_not(call, expected, refuse)
                    if why:
                        refused[str(candidate)] = why
                        continue
                    took = seconds(call)
                timed += 1
                if took < best * (1 - GAIN):
                    best, configs[choice], climbing = took, candidate, True
        found.append((choice, timed, refused))
    return [
        Tuned(choice, configs[choice], best, begin, timed, refused)
        for choice, timed, refused in found
    ]


def _why_not(
    call: Callable[[], tuple[torch.Tensor, ...]],
    expected: list[torch.Tensor],
    refuse: Callable[[list[Launch]], str],
) -> str:
    try:
        with record() as launches:
            call()
        if why := refuse(launches):
            return why
        outputs = call()
        for actual, wanted in zip(outputs, expected, strict=True):
            error = (actual.double() - wanted.double()).square().mean().sqrt()
            size = wanted.double().square().mean().sqrt()
            if not error <= TOLERANCE.get(wanted.dtype, 0.0) * size:
                return f"gives another result: {error:.3g} away, where it is {size:.3g} large"
    except Exception as error:  # a candidate that cannot be compiled or launched
        return f"{type(error).__name__}: {error}"
    return ""
