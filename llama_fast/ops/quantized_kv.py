"""Keys or values in 8 bits, with a scale for each position and KV head.

    x[b,s,h,d] ≈ scales[b,s,h] · codes[b,s,h,d]      scale = max_d |x| / 127      code = x / scale

One scale a head and position: both products of attention take it out of their sums, over d for the
keys and over s for the values, so that these may be sums of integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import ShapeError
from . import checks
from .rms_norm import accumulate

LARGEST = 127


class QuantizedKV(NamedTuple):
    """What `kv_append` and `attention` take in the place of a tensor of keys or of values.

    codes   (B,S,K,D) int8
    scales  (B,S,K) float32
    """

    codes: torch.Tensor
    scales: torch.Tensor


def quantize(x: torch.Tensor) -> QuantizedKV:
    """x (..., D) rounded: codes of x's shape, and scales (...) float32, or float64 of a float64 x.

    Codes are rounded to even. Where x holds an infinity or NaN the scale is one too and the codes
    are 0, so that what is made of them is not finite either.
    """
    xf = x.to(accumulate(x.dtype))
    scales = xf.abs().amax(-1) / LARGEST
    codes = (xf / scales[..., None]).nan_to_num(0, 0, 0)  # 0 / 0 where x is 0
    return QuantizedKV(codes.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales)


def dequantize(kv: QuantizedKV, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the codes stand for, (..., D), rounded once to `dtype`."""
    codes, scales = kv
    return (codes.to(scales.dtype) * scales[..., None]).to(dtype)


def check(op: str, name: str, kv: QuantizedKV, q: torch.Tensor, shape: tuple[int, ...]) -> None:
    """codes and scales of `name`, "k" or "v_cache" say, for keys or values of this shape."""
    codes, scales = kv
    checks.shape(op, f"{name}'s codes", codes, shape, "(B, S, K, D)")
    checks.shape(op, f"{name}'s scales", scales, shape[:3], "(B, S, K)")
    # In float64 the reference is its own oracle.
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    for part, tensor, dtype in (("codes", codes, torch.int8), ("scales", scales, wide)):
        if tensor.dtype is not dtype:
            raise ShapeError(f"{op}: {name}'s {part} are {tensor.dtype}; they must be {dtype}")
        if tensor.device != q.device:
            raise ShapeError(
                f"{op}: {name}'s {part} are on {tensor.device} and q on {q.device}; "
                f"move both to one device with .to({str(q.device)!r})"
            )


def is_quantized(op: str, k: object, v: object) -> bool:
    """Whether keys and values are held in 8 bits; raises ShapeError where only one of them is."""
    kinds = [isinstance(x, QuantizedKV) for x in (k, v)]
    if any(kinds) and not all(kinds):
        raise ShapeError(
            f"{op}: one of keys and values is a QuantizedKV and the other a tensor; "
            "give both in 8 bits, or neither"
        )
    return kinds[0]
