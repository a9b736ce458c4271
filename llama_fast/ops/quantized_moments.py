"""The two moments of AdamW in 8 bits, with a scale for each block of 256 elements.

    exp_avg     m ≈ scale · sign(q) · (q / 127)²      q in -127 … 127, int8
    exp_avg_sq  v ≈ scale · (q / 255)⁴                q in 0 … 255, uint8
    scale = the largest |m|, or v, of the block

AdamW divides m by √v, whose elements in a block differ by orders of magnitude. So the steps are
finer near zero: those of m grow with √|m|, those of v as the squares of m's. A v above 0 is never
rounded to 0, since an m divided by it would take a step without bounds. Other powers were further
from AdamW in float32, linear steps the furthest (docs/ops/adamw.md).

With exp_avg_sq's usual decay of 0.999 a step changes v by less than half of what lies between two
values, and rounding to the nearest would leave it where it is. So values are rounded stochastically
where a seed is given: element i draws word i, exp_avg its lower half, exp_avg_sq its upper half
(random_bits.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .random_bits import words

BLOCK = 256


class Map(NamedTuple):
    """A map of 8-bit values: the largest of them, the power by which they grow, their dtype, which
    half of a word they draw, and the least value of a number above 0."""

    largest: int
    power: int
    dtype: torch.dtype
    shift: int
    least: int


FIRST = Map(127, 2, torch.int8, 0, 0)
SECOND = Map(255, 4, torch.uint8, 16, 1)


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


def _in_blocks(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def quantize(x: Tensor, map: Map, seed: int | None, stream: int) -> tuple[Tensor, Tensor]:
    """Returns the 8-bit values of x (...), float32 or float64, and their scales (blocks,) of x's
    dtype. Without a seed values are rounded to the nearest.

    Where a block holds an infinity or NaN the scale is one too, and so is all that is made of it.
    """
    block = _in_blocks(x)
    scale = block.abs().amax(1)
    least = torch.finfo(torch.float32).tiny  # so that its inverse is a number
    share = block.abs() / scale.where(scale > least, least)[:, None]
    q = (share.sqrt() if map.power == 2 else share.sqrt().sqrt()) * map.largest
    up = 0.5
    if seed is not None:
        draws = words(seed, stream, x.numel(), x.device) >> map.shift & 0xFFFF
        up = _in_blocks(draws.to(x.dtype) / 65536)
    q = torch.floor(q + up)
    q = q.where(q <= map.largest, map.largest)  # of NaN too
    if map.least:
        q = q.where((q >= map.least) | (block <= 0), map.least)
    q = (q * block.sign()).nan_to_num(0).view(-1)[: x.numel()].view(x.shape)
    return q.to(map.dtype), scale


def dequantize(q: Tensor, scale: Tensor, map: Map) -> Tensor:
    """Returns the numbers that 8-bit values (...) stand for, in the scales' dtype."""
    share = _in_blocks(q.to(scale.dtype) / map.largest)
    grown = share * share.abs() if map.power == 2 else share.square().square()
    return (grown * scale[:, None]).view(-1)[: q.numel()].view(q.shape)
