"""How a weight of 8-bit or 4-bit integers lies in memory, and the numbers that it stands for.

    w[o, i] = scale · level(q)         symmetric: no minima
    w[o, i] = scale · q + minimum      otherwise

    level(q) = q - 128                             for 8 bits
    level(q) = ⌊(t (192 + t²) + 16) / 32⌋, t = q - 8   for 4: -64, -53, -43, -34, -26, -19, -12, -6,
                                                   0, 6, 12, 19, 26, 34, 43, 53

The 16 levels are closer together around zero, where most weights of a group are: evenly spaced ones
are 7% to 9% further from the weights. They are whole numbers of 7 bits, so that integers may be
multiplied, and a formula, so that no kernel needs a table.

A group is `group_size` columns of one row of w: it has one scale, and one minimum.

Shapes    of a weight (C_out, C_in). C_pad is C_in rounded up to whole groups, NB the number of
          blocks of 16 rows of w: C_out / 16, rounded up
          values   uint8 (NB, C_pad/4, 16, 4) for 8 bits, (NB, C_pad/8, 16, 4) for 4
          scales   float16 (NB, C_pad/group_size, 16); minima the same, or None
Layout    the 16 rows of a block are interleaved, so that a kernel which sums 16 rows at a time
          reads values and scales in the order in which they lie. Row 16b + r and column i have
              8 bits    values[b, i // 4, r, i % 4]
              4 bits    values[b, i // 8, r, i % 4], its low half if i % 8 < 4, else its high half
              scale     scales[b, i // group_size, r]
          The values of padded columns are the centre, whose level is 0 (0 with minima), padded rows
          have scale 0
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.quantization import ROWS, packed_shapes
from ..errors import ShapeError
from .inputs import rand, randint

BLOCK = 1 << 22  # weights that the reference dequantises at a time
LOWEST = -64  # level of 4 bits


def centre(bits: int) -> int:
    """Returns the value of a symmetric weight that stands for zero."""
    return 1 << (bits - 1)


def levels(t: Tensor, bits: int) -> Tensor:
    """Returns what symmetric values stand for, but for their scale: `t` is what they are less the
    centre, whole numbers in a float dtype."""
    return t if bits == 8 else ((t * (192 + t * t) + 16) / 32).floor()


def numbers(values: Tensor, scales: Tensor, minima: Tensor | None, bits: int) -> Tensor:
    """Returns the numbers that values stand for: floats in, of one dtype, and floats out."""
    if minima is None:
        return levels(values - centre(bits), bits) * scales
    return values * scales + minima


def check_weight(
    op: str,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    size: tuple[int, int],
    bits: int,
    group_size: int,
) -> None:
    of_values, of_scales = packed_shapes(*size, bits, group_size)
    given = [("weight", values, of_values), ("scales", scales, of_scales)]
    if minima is not None:
        given.append(("minima", minima, of_scales))
    for name, tensor, needed in given:
        if tensor.shape != needed:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; a weight of (C_out, C_in) = {size} "
                f"with bits={bits} and group_size={group_size} needs {needed}"
            )
        dtypes = (torch.uint8,) if name == "weight" else (torch.float16,)
        if name != "weight" and x.dtype is torch.float64:  # the reference is its own oracle there
            dtypes = (torch.float16, torch.float64)
        if tensor.dtype not in dtypes:
            raise ShapeError(f"{op}: {name} is {tensor.dtype}; it must be {dtypes[0]}")
        if tensor.device != x.device:
            raise ShapeError(
                f"{op}: {name} is on {tensor.device} and the tensor to multiply on {x.device}; "
                f"move both to one device with .to({str(x.device)!r})"
            )
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{op}: {name} has strides {tensor.stride()}; it must be contiguous: call "
                ".contiguous() on it once, not in every step"
            )


def dequantize(
    values: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the weights of some blocks, padding included: (blocks · R, C_pad), where R is the
    number of rows of a block that are given: all 16, or one that was picked out of each."""
    blocks, _, R, _ = values.shape
    groups = scales.shape[1]
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=3)  # (blocks, runs, R, 2, 4)

    def of_rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(blocks * R, groups, 1).to(dtype)

    w = values.transpose(1, 2).reshape(blocks * R, groups, group_size).to(dtype)
    w = numbers(w, of_rows(scales), None if minima is None else of_rows(minima), bits)
    return w.view(blocks * R, groups * group_size)


def dequantized_blocks(
    values: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    dim: int = 0,
) -> Iterator[Tensor]:
    """Yields the weights in order, BLOCK of them at a time: a large head never exists whole. They
    are cut into rows, whole blocks of them; or with dim=1 into columns, whole groups of them."""
    step = max(1, BLOCK // max(1, ROWS * scales.shape[1 - dim] * group_size))
    runs = group_size * bits // 32 if dim else 1  # of values, to a group
    least = repeat(None) if minima is None else minima.split(step, dim)
    parts = zip(values.split(step * runs, dim), scales.split(step, dim), least, strict=False)
    for part in parts:
        yield dequantize(*part, bits, group_size, dtype)


def rounded(x: Tensor, group_size: int) -> Tensor:
    """Returns x rounded to 8 bits in each group of its last dim, in float32, of x's shape.

    To autograd this is the identity: a derivative of rounding would be zero everywhere.
    """
    C_in = x.shape[-1]
    padded = F.pad(x.detach().float(), (0, -C_in % group_size))
    groups = padded.view(*x.shape[:-1], padded.shape[-1] // group_size, group_size)
    s = groups.abs().amax(-1, keepdim=True) / 127
    x_q = torch.where(s == 0, 0.0, (groups / s).round())
    exact = x.float()
    return exact + ((x_q * s).flatten(-2)[..., :C_in] - exact).detach()


def random_weight(
    g, C_out: int, C_in: int, bits: int, group_size: int, symmetric: bool, device
) -> tuple:
    """Returns random arguments of a weight that makes y's elements of the order of 1."""
    of_values, of_scales = packed_shapes(C_out, C_in, bits, group_size)
    fill = centre(bits) if symmetric else 0
    values = randint(g, 256, *of_values, dtype=torch.uint8)
    padding = of_scales[1] * group_size - C_in
    if padding:
        per = 32 // bits
        column = torch.arange(of_values[1] * per, device=values.device).view(-1, 1, per)
        if bits == 8:
            values[(column >= C_in).expand(values.shape)] = fill
        else:
            low, high = (column >= C_in).split(4, dim=-1)
            values = torch.where(low, values & 240 | fill, values)
            values = torch.where(high, values & 15 | fill << 4, values)
    largest = -LOWEST if symmetric and bits == 4 else centre(bits)
    scales = (0.5 + rand(g, *of_scales)) * max(C_in, 1) ** -0.5 / largest
    minima = None if symmetric else (-scales * centre(bits)).half().to(device)
    return values.to(device), scales.half().to(device), minima, C_out, bits, group_size
