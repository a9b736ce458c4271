"""The values and scales that a group of weights is rounded to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from .quantized_layout import LOWEST, centre, levels

# (groups (..., group_size), bits, symmetric) → (scales, minima or None), float16 (...)
Fit = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
# Weights that are rounded at a time on a GPU, where each time is some hundred launches: several
# float32 tensors of as many take 0.7 GB.
AT_ONCE_ON_GPU = 1 << 25


def nearest(u: Tensor) -> Tensor:
    """Which of the 16 levels of 4 bits is nearest to `u`, counted from the centre: -8 … 7, in u's
    dtype.

    The inverse of the levels is a curve of odd powers, fitted to where one level's numbers end and
    the next one's begin; off by a thirtieth of a step there, which costs 0.2% of the error, where a
    search among 15 bounds would take ten times as long.
    """
    s = u * u
    s = s.mul(1.9898088e-9).sub_(1.7354857e-5).mul_(s).add_(0.16446258).mul_(u)
    return s.round_().clamp_(-8, 7)


def stored(scales: Tensor) -> Tensor:
    """`scales` (...) as float16; never smaller, where float16 has but few bits left for them.

    Below its normal numbers float16 counts in steps of 6e-8. A scale that is rounded down there, to
    zero at worst, cuts off the largest numbers of its group; a larger one costs wider steps only.
    """
    half = scales.half()
    cut = (half.abs() < torch.finfo(torch.float16).tiny) & (half.float().abs() < scales.abs())
    return (half.view(torch.int16) + cut).view(torch.float16)  # away from zero, whatever the sign


def enclosing(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and minima, float16 (...), that take in all numbers of `groups` (..., group_size)."""
    if symmetric:
        low, high = groups.aminmax(dim=-1)
        if bits == 8:
            return stored(torch.maximum(-low, high) / 127), None
        # The largest number by its size becomes code 0: LOWEST times a scale of the other sign.
        return stored(torch.where(-low > high, low, high) / LOWEST), None
    low, high = groups.aminmax(dim=-1)
    return stored((high - low) / (2**bits - 1)), low.half()


def encode(groups: Tensor, scales: Tensor, minima: Tensor | None, bits: int) -> Tensor:
    """The quantised values, uint8, nearest to `groups` (..., group_size) under scales and minima
    (...)."""
    scale = scales.float().unsqueeze(-1)
    if minima is not None:
        groups = groups - minima.float().unsqueeze(-1)
    of_one = torch.where(scale == 0, 0.0, groups / scale)
    if minima is not None:
        return of_one.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    t = nearest(of_one) if bits == 4 else of_one.round_().clamp_(-127, 127)
    return t.add_(centre(bits)).to(torch.uint8)


def refuse_non_finite(groups: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    """Raises ShapeError where weights are not finite, or too large for float16 scales."""
    if torch.isfinite(scales).all() and (minima is None or torch.isfinite(minima).all()):
        return
    if torch.isfinite(groups).all():
        raise ShapeError(
            f"QuantizedWeight: the weight has numbers up to {groups.abs().max():.3g}, which "
            "float16 scales cannot reach; keep it as it is, or scale it down"
        )
    raise ShapeError("QuantizedWeight: the weight has numbers that are not finite")


def best_fit(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and minima as of `enclosing`; where they are coarse, the scales of least squares."""
    if bits == 4 and symmetric:
        return search_scales(groups), None
    return enclosing(groups, bits, symmetric)


# Shares of the lowest level that the largest number is meant for. Above 1 it is cut off, so that
# the others fall closer together; more shares gain less than 0.4% of error.
_SHARES = (0.8, 0.87, 0.94, 1.0, 1.07)
_CHUNK = 1 << 17  # numbers that go through a CPU's caches together


def search_scales(groups: Tensor) -> Tensor:
    """The scales, float16 (...), that leave symmetric four-bit values of `groups`
    (..., group_size) the least squared error, among some.

    For levels v, the scale of least error is s = Σ wv / Σ v² and the error Σ w² - s Σ wv. They
    are made for each of _SHARES, and the scale of the best of them is taken.
    """
    rows = groups.reshape(-1, groups.shape[-1])
    found = torch.empty(len(rows), dtype=torch.float16, device=rows.device)
    most = _CHUNK if rows.device.type == "cpu" else AT_ONCE_ON_GPU
    step = max(1, most // rows.shape[1])
    for start in range(0, len(rows), step):
        w = rows[start : start + step]
        low, high = w.aminmax(dim=-1)
        # The largest number by its size is meant for code 0, the lowest level.
        largest = torch.where(-low > high, low, high)
        inverse = (LOWEST / largest).nan_to_num_(0, 0, 0)
        best, scale = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for share in _SHARES:
            v = levels(nearest(w * (inverse * share).unsqueeze(-1)), 4)
            wv, vv = torch.linalg.vecdot(w, v), torch.linalg.vecdot(v, v)
            s = wv / vv.clamp_(min=1)
            better = wv * s > best
            best, scale = torch.where(better, wv * s, best), torch.where(better, s, scale)
        # Times zero, a number that is not finite is NaN: whoever stores the weight refuses it.
        found[start : start + step] = stored(scale + largest * 0)
    return found.view(groups.shape[:-1])
