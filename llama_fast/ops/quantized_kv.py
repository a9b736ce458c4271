"""Keys or values in 8 bits, with a scale for each position and KV head.

    x[b,s,h,d] ≈ scale[b,s,h] · q[b,s,h,d]      scale = max_d |x| / 127      q = x / scale

One scale a head and position: both products of attention take it out of their sums, over d for the
keys and over s for the values, so that these may be sums of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from . import checks
from .rms_norm import accumulate

LARGEST = 127


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x (..., D) rounded: int8 values of x's shape, and their scales (...) float32, or
    float64 of a float64 x.

    Values are rounded to even. Where x holds an infinity or NaN the scale is one too and the values
    are 0, so that what is made of them is not finite either.
    """
    xf = x.to(accumulate(x.dtype))
    scale = xf.abs().amax(-1) / LARGEST
    values = (xf / scale[..., None]).nan_to_num(0, 0, 0)  # 0 / 0 where x is 0
    return values.round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers that the 8-bit values stand for, (..., D), rounded once to `dtype`."""
    return (values.to(scale.dtype) * scale[..., None]).to(dtype)


def check(
    op: str, q: Tensor, shape: tuple[int, ...], k_name: str, k: Tensor, k_scale: Tensor | None,
    v_name: str, v: Tensor, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """Keys and values of this shape are both of q's dtype without scales, or both in 8 bits with
    scales; on q's device."""
    if (k_scale is None) != (v_scale is None):
        raise ShapeError(
            f"{op}: one of k_scale and v_scale is given; give both, for keys and values in 8 bits, "
            "or neither"
        )
    checks.shape(op, k_name, k, shape, "(B, S, K, D)")
    checks.shape(op, v_name, v, shape, f"{k_name}'s shape")
    if k_scale is None:
        for name, x in ((k_name, k), (v_name, v)):
            if x.dtype is torch.int8 and q.dtype in checks.FLOATS:
                raise ShapeError(
                    f"{op}: {name} is {x.dtype}; 8-bit keys and values need k_scale and v_scale"
                )
        return checks.same_kind(op, "q", q, **{k_name: k, v_name: v})
    checks.same_kind(op, "q", q)
    # In float64 the reference is its own oracle.
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    for name, x, dtype in (
        (k_name, k, torch.int8), (v_name, v, torch.int8),
        ("k_scale", k_scale, wide), ("v_scale", v_scale, wide),
    ):  # fmt: skip
        if dtype is wide:
            checks.shape(op, name, x, shape[:3], "(B, S, K)")
        if x.dtype is not dtype:
            raise ShapeError(f"{op}: {name} is {x.dtype}; with scales it must be {dtype}")
        if x.device != q.device:
            raise ShapeError(
                f"{op}: {name} is on {x.device} and q on {q.device}; "
                f"move both to one device with .to({str(q.device)!r})"
            )
