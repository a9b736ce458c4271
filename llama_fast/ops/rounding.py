"""The values and scales that a group of weights is rounded to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from .quantized_layout import centre

# (groups (..., group_size), bits, symmetric) → (scales, minima or None), float16 (...)
Fit = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
# Weights that are rounded at a time on a GPU, where each time is some hundred launches: several
# float32 tensors of as many take 0.7 GB.
AT_ONCE_ON_GPU = 1 << 25


def enclosing(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and minima, float16 (...), that take in all numbers of `groups` (..., group_size)."""
    if symmetric:
        low, high = groups.aminmax(dim=-1)
        if bits == 8:
            return (torch.maximum(-low, high) / 127).half(), None
        # The largest number by its size becomes code 0: -8 times a scale of the other sign.
        return (torch.where(-low > high, low, high) / -8).half(), None
    low, high = groups.aminmax(dim=-1)
    return ((high - low) / (2**bits - 1)).half(), low.half()


def encode(groups: Tensor, scales: Tensor, minima: Tensor | None, bits: int) -> Tensor:
    """The quantised values, uint8, nearest to `groups` (..., group_size) under scales and minima
    (...)."""
    scale = scales.float().unsqueeze(-1)
    if minima is None:
        low, high, zero = (1 if bits == 8 else 0), 2**bits - 1, float(centre(bits))
    else:
        low, high, zero = 0, 2**bits - 1, 0.0
        groups = groups - minima.float().unsqueeze(-1)
    qdata = torch.where(scale == 0, zero, groups / scale + zero)
    return qdata.round_().clamp_(low, high).to(torch.uint8)


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


# Shares of the scale that takes in the largest number. Below 1 it is stretched beyond the quantised
# values, so that the others fall closer together; more shares gain less than 0.2% of error.
_SHARES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
_CHUNK = 1 << 17  # numbers that go through a CPU's caches together


def search_scales(groups: Tensor) -> Tensor:
    """The scales, float16 (...), that leave symmetric four-bit values of `groups`
    (..., group_size) the least squared error, among some.

    For quantised values q, the scale of least error is s = Σ wq / Σ q² and the error
    Σ w² - s Σ wq. They are made for each of _SHARES, and the scale of the best of them is taken.
    """
    rows = groups.reshape(-1, groups.shape[-1])
    found = torch.empty(len(rows), dtype=torch.float16, device=rows.device)
    most = _CHUNK if rows.device.type == "cpu" else AT_ONCE_ON_GPU
    step = max(1, most // rows.shape[1])
    for start in range(0, len(rows), step):
        w = rows[start : start + step]
        low, high = w.aminmax(dim=-1)
        # The largest number by its size is meant for code 0, which stands for -8.
        inverse = (-8 / torch.where(-low > high, low, high)).nan_to_num_(0, 0, 0)
        best, scale = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for share in _SHARES:
            q = (w * (inverse * share).unsqueeze(-1)).round_().clamp_(-8, 7)
            wq, qq = torch.linalg.vecdot(w, q), torch.linalg.vecdot(q, q)
            s = wq / qq.clamp_(min=1)
            better = wq * s > best
            best, scale = torch.where(better, wq * s, best), torch.where(better, s, scale)
        found[start : start + step] = scale
    return found.view(groups.shape[:-1])
