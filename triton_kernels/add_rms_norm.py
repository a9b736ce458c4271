"""Residual addition and RMSNorm in one: total = x + residual; y = rms_norm(total).

The sum is rounded to the dtype, as the model's own addition is, and the norm is of the rounded sum.
Two tensors are read and two written, each once.

Backward, with (dx, dw) those of rms_norm at total: d_x = d_residual = dx + the gradient of total.
The kernel is rms_norm's, with that gradient as its addend. So is the one for rows beyond registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import rms_norm as norm
from .chips import chip_of
from .choice import chosen
from .launch import TYPES, launch, next_power_of_2
from .rows import row_offset, rows
from .shapes import WIDE, B, Dims, T, empty


@triton.jit(do_not_specialize=["N"])
def add_rms_norm_fwd_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C)
    weight_ptr,  # (C,)
    y_ptr,  # (N, C) contiguous
    total_ptr,  # (N, C) contiguous
    N,
    C,
    n1,
    n2,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_r0,
    stride_r1,
    stride_r2,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < N) & (column[None, :] < C)
    x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
    x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    r_row = residual_ptr + row_offset(row, n1, n2, stride_r0, stride_r1, stride_r2)
    residual = tl.load(r_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)

    rounded = (x + residual).to(total_ptr.dtype.element_ty)
    out = row[:, None] * C + column[None, :]
    tl.store(total_ptr + out, rounded, mask=inside)
    total = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(total * total, axis=1) / C + eps)
    y = total * r[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As llama_fast.ops.add_rms_norm."""
    C = x.shape[-1]
    if C > norm.FORWARD_WHOLE:
        return norm.forward_wide(x, residual, weight, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    N, n1, n2, (stride_x, stride_r) = rows(x, residual)
    config = chosen(
        "add_rms_norm",
        "add_rms_norm_fwd",
        chip_of(x),
        norm.forward_config(C, x.dtype),
        C=C,
        dtype=TYPES[x.dtype],
    )
    launch(
        add_rms_norm_fwd_kernel,
        (-(-N // config.block_n),),
        x,
        residual,
        weight,
        y,
        total,
        N,
        C,
        n1,
        n2,
        *stride_x,
        *stride_r,
        eps,
        BLOCK_N=config.block_n,
        BLOCK_C=next_power_of_2(C),
        num_warps=config.num_warps,
    )
    return y, total


def add_rms_norm_backward(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op add_rms_norm_backward of llama_fast.ops.add_rms_norm."""
    return norm.backward(grad_y, grad_total, total, weight, eps)


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for C, dtype in norm.row_sizes(models, brief):
        x, weight = empty(B, T, C, dtype=dtype), empty(C, dtype=dtype)
        yield "add_rms_norm", (x, x, weight, 1e-5)
        if C != WIDE:
            yield "add_rms_norm_backward", (x, x, x, weight, 1e-5)
