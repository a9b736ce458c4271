"""How far a result is from the one it should be."""

from __future__ import annotations

import math

from torch import Tensor


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """The root mean square of `found - expected` over that of `expected`, reckoned in float64.

    0 where both are all zeros, infinity where only `expected` is; NaN where either holds one.
    """
    exact = expected.double()
    change, size = (found.double() - exact).norm().item(), exact.norm().item()
    if size == 0:
        return math.inf if change > 0 else change
    return change / size
