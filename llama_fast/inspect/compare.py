"""Where two passes over the same tokens part, and how their difference grows layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.compare import relative_rms
from ..utils.text import aligned
from .watch import Step

# Relative differences of so many units of a dtype are rounding, by the bytes of a number. The half
# types are summed up in float32; the sums of float32 are its own, in an order of the backend's.
ROUNDING = {2: 4, 4: 64, 8: 64}


class Difference(NamedTuple):
    """One step of two passes.

    norms     of the step's tensor in each pass
    relative  the norm of their difference over the first norm; infinite where the shapes differ
    largest   difference of two elements
    grown     how many times larger `relative` is than at the step before it that differs; 0 at the
              first of them
    """

    name: str
    norms: tuple[float, float]
    relative: float
    largest: float
    grown: float = 0.0


@dataclass
class Comparison:
    """steps      those that both passes have, in their order
    tolerance  relative difference up to which two tensors count as alike
    """

    steps: list[Difference]
    tolerance: float

    @property
    def first(self) -> Difference | None:
        """The first step that differs by more than the tolerance; None where none does."""
        return next((step for step in self.steps if not step.relative <= self.tolerance), None)

    @property
    def first_bits(self) -> Difference | None:
        """The first step that differs at all, be it by rounding."""
        return next((step for step in self.steps if step.relative != 0), None)

    @property
    def layers(self) -> list[Difference]:
        """The residual stream before each layer and after the last; `grown` is from one to the
        next."""
        stream = re.compile(r"layers\.\d+\.input|residual").fullmatch
        return _grown(step for step in self.steps if stream(step.name))

    def __str__(self) -> str:
        rows = [("step", "norm", "other norm", "relative difference", "largest", "grown")]
        for step in self.steps:
            grown = f"{step.grown:.3g} ×" if step.grown else ""
            mark = " ← first" if step == self.first else ""
            rows.append((step.name, *(f"{norm:.4g}" for norm in step.norms),
                         f"{step.relative:.3g}{mark}", f"{step.largest:.3g}", grown))  # fmt: skip
        return "\n".join((*aligned(rows, str.rjust), self.summary))

    @property
    def summary(self) -> str:
        """One sentence."""
        if (first := self.first) is not None:
            return f"They part at {first.name}: relative difference {first.relative:.3g}."
        if (bits := self.first_bits) is not None:
            worst = max(step.relative for step in self.steps)
            return (
                f"They agree to {worst:.2g}, within the tolerance of {self.tolerance:.2g}; the "
                f"first bits that differ are in {bits.name}."
            )
        return "They are the same, bit for bit."


def compare(ours: Iterable[Step], theirs: dict[str, Step], tolerance: float | None) -> Comparison:
    differences: list[Difference] = []
    dtypes = set()
    for step in ours:
        other = theirs.get(step.name)
        if other is None:
            continue
        dtypes |= {step.dtype, other.dtype}
        a, b = step.tensor().detach().cpu().double(), other.tensor().detach().cpu().double()
        norms = _norm(a), _norm(b)
        if a.shape != b.shape:
            relative = largest = math.inf
        elif torch.equal(a, b):  # infinities, where a mask is, included
            relative = largest = 0.0
        else:
            both = torch.isneginf(a) & torch.isneginf(b)
            a, b = a.masked_fill(both, 0), b.masked_fill(both, 0)
            relative, largest = relative_rms(b, a), (b - a).abs().max().item()
        differences.append(Difference(step.name, norms, relative, largest))
    if tolerance is None:
        units = (ROUNDING[dtype.itemsize] * torch.finfo(dtype).eps for dtype in dtypes)
        tolerance = max(units, default=0.0)
    return Comparison(_grown(differences), tolerance)


def _grown(steps: Iterable[Difference]) -> list[Difference]:
    found, before = [], 0.0
    for step in steps:
        found.append(step._replace(grown=step.relative / before if before else 0.0))
        before = step.relative or before
    return found


def _norm(x: Tensor) -> float:
    return x.masked_fill(torch.isneginf(x), 0).norm().item()
