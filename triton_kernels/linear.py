"""Linear layer whose weight is 8-bit or 4-bit integers: y = x Wᵀ, dequantised on the way.

    y[m, o] = Σ over groups of scale[o] · Σ_i x[m, i] · level(q[o, i])
        or, where there are minima, scale[o] · (Σ_i x[m, i] · (q[o, i] - centre))
                                    + (minimum[o] + centre · scale[o]) · Σ_i x[m, i]
        (of values that are not centred the two sums would be large and nearly cancel, which
        float32 x shows)

Bound by reading the weight while rows are few: a program owns 16 to 64 rows of W and walks their
groups. Levels are whole numbers of at most 8 bits, which the half types hold exactly, so a group
is one matrix product of x with the levels themselves, and its scale multiplies 16 sums rather than
16 · group_size weights. x is not rounded to 8 bits, as the CPU's kernels do: sums are in float32.

Layout: uint8 (NB, C_pad/4, 16, 4) for 8 bits and (NB, C_pad/8, 16, 4) for 4, scales and minima
float16 (NB, C_pad/group_size, 16), as llama_fast.ops.quantized_layout describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import Chip, chip_of
from .choice import chosen, knob
from .launch import launch, next_power_of_2
from .rows import row_offset, rows
from .shapes import Dims, empty


@triton.jit(do_not_specialize=["M"])
def linear_quantized_kernel(
    x_ptr,  # (M, C_in)
    weight_ptr,
    scales_ptr,
    minima_ptr,
    y_ptr,  # (M, C_out) contiguous
    M,
    C_in,
    C_out,
    groups,
    n1,
    n2,
    stride_x0,
    stride_x1,
    stride_x2,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, GROUP)
    block, r = (o // 16).to(tl.int64), o % 16
    x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
    RUN: tl.constexpr = 32 // BITS  # columns of the four bytes that lie together
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    # Bytes from a block's start to (row r, column i) of its first group.
    byte = r[:, None] * 4 + (i // RUN)[None, :] * 64 + (i % 4)[None, :]
    value_row = weight_ptr + (block * groups * (GROUP // RUN * 64))[:, None] + byte
    scale_at = block * groups * 16 + r
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for group in range(0, groups):
        column = group * GROUP + i
        inside = (row[:, None] < M) & (column[None, :] < C_in)
        x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0)
        valid = o < C_out
        q = tl.load(value_row + group * (GROUP // RUN * 64), mask=valid[:, None], other=0)
        if BITS == 4:  # the second four columns of a run are the high halves
            q = (q >> (i % RUN // 4 * 4)[None, :].to(tl.uint8)) & 15
        scale = tl.load(scales_ptr + scale_at + group * 16, mask=valid, other=0.0).to(tl.float32)
        t = q.to(tl.int32) - CENTRE
        if BITS == 4 and not HAS_MINIMA:
            t = (t * (192 + t * t) + 16) >> 5
        w = t.to(tl.float32)
        s = tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
        acc += s * scale[None, :]
        if HAS_MINIMA:
            minimum = tl.load(minima_ptr + scale_at + group * 16, mask=valid, other=0.0)
            minimum = minimum.to(tl.float32) + CENTRE * scale
            acc += tl.sum(x.to(tl.float32), axis=1)[:, None] * minimum[None, :]
    inside = (row[:, None] < M) & (o[None, :] < C_out)
    y_at = row[:, None] * C_out + o[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class QuantizedConfig:
    """Rows of x and of the weight of a program, and its warps."""

    block_m: int = knob(16, 128)
    block_o: int = knob(16, 256)
    num_warps: int = knob(1, 16)


def config_for(chip: Chip, M: int, C_out: int) -> QuantizedConfig:
    """Few rows: as many rows of the weight as leave each processor four programs."""
    block_m = max(16, min(64, next_power_of_2(M)))
    if block_m > 16:
        return QuantizedConfig(block_m, 64, num_warps=4)
    for block_o in (64, 32):
        if C_out >= block_o * 4 * chip.processors:
            return QuantizedConfig(block_m, block_o, num_warps=block_o // 16)
    return QuantizedConfig(block_m, 16, num_warps=1)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """As llama_fast.ops.linear with a quantised weight; torch multiplies by all others."""
    C_in = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], C_out))
    M, n1, n2, (stride_x,) = rows(x)
    if C_in == 0:
        return y.zero_()
    chip = chip_of(x)
    config = chosen(
        "linear",
        "linear_quantized",
        chip,
        config_for(chip, M, C_out),
        rows=max(16, min(64, next_power_of_2(M))),
        C_out=C_out,
        C_in=C_in,
        bits=bits,
        group_size=group_size,
    )
    launch(
        linear_quantized_kernel,
        (-(-C_out // config.block_o), -(-M // config.block_m)),
        x,
        weight,
        scales,
        minima,
        y,
        M,
        C_in,
        C_out,
        scales.shape[1],
        n1,
        n2,
        *stride_x,
        BITS=bits,
        GROUP=group_size,
        HAS_MINIMA=minima is not None,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        num_warps=config.num_warps,
    )
    return y


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for _, _, _, C, F in models:
        for bits, group in ((8, 64), (4, 32)):
            values = empty(F // 16, C * bits // 32, 16, 4, dtype=torch.uint8)
            scales = empty(F // 16, C // group, 16, dtype=torch.float16)
            for tokens in (1, 512):
                yield "linear", (empty(tokens, C), values, scales, None, F, bits, group)
