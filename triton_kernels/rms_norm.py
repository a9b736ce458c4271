"""RMSNorm: y = x · r · weight with r = 1 / sqrt(mean(x²) + eps), over the last dim.

Backward, with g the gradient of y and x̂ = x · r:
    dx = r · (g·w - x̂ · mean(g·w · x̂))        dw = Σ over rows of g · x̂

Both are bound by memory: a program keeps whole rows in registers, so each byte is read once. The
weight's gradient is a sum over all rows. Each program of the backward pass walks its own share of
them and keeps its sum in registers; the programs' sums, some megabytes at most, are added up by a
second small kernel. Atomics would need no second kernel, but would add in another order each time.

Longer rows are more than registers hold: beyond 32,768 elements forward, beyond 8,192 backward.
There a program takes rows in chunks of columns, once for their sums, and once more, from L2, for
the results. Its sum of dw lies in memory, each chunk added once for a few rows together.

N rows of C elements; x (N, C) with any strides of rows, weight (C,), y (N, C) contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import Chip, chip_of
from .choice import chosen, knob
from .launch import TYPES, launch, next_power_of_2
from .rows import row_offset, rows, sum_rows
from .shapes import FULL, HALF, WIDE, WIDTHS, B, Dims, T, empty

FORWARD_WHOLE = 32768  # elements; a row of float32 then fills half of a processor's registers
BACKWARD_WHOLE = 8192  # where four rows are live


@triton.jit(do_not_specialize=["N"])
def rms_norm_fwd_kernel(
    x_ptr,  # (N, C)
    weight_ptr,  # (C,)
    y_ptr,  # (N, C) contiguous
    N,
    C,
    n1,
    n2,
    stride_x0,
    stride_x1,
    stride_x2,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < N) & (column[None, :] < C)
    x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
    x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    y = x * r[:, None] * weight[None, :]  # in float32 up to here, rounded once
    y_row = y_ptr + row * C
    tl.store(y_row[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_total(x_row, residual_row, total_ptr, column, inside, HAS_RESIDUAL: tl.constexpr):
    """What is normalised, in float32: x, or its sum with the residual, rounded to their dtype."""
    x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_row[:, None] + column[None, :], mask=inside, other=0.0)
        x = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["N"])
def rms_norm_fwd_wide_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C), added to x; only if HAS_RESIDUAL
    weight_ptr,  # (C,)
    y_ptr,  # (N, C) contiguous
    total_ptr,  # (N, C) contiguous: x + residual; only if HAS_RESIDUAL
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
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rms_norm_fwd_kernel, and add_rms_norm's, for rows that do not fit into registers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
    r_row = residual_ptr + row_offset(row, n1, n2, stride_r0, stride_r1, stride_r2)
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = (row[:, None] < N) & (column[None, :] < C)
        x = load_total(x_row, r_row, total_ptr, column, inside, HAS_RESIDUAL)
        squares += x * x
    r = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)[:, None]
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = (row[:, None] < N) & (column[None, :] < C)
        x = load_total(x_row, r_row, total_ptr, column, inside, HAS_RESIDUAL)
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        out = row[:, None] * C + column[None, :]
        if HAS_RESIDUAL:
            tl.store(total_ptr + out, x.to(total_ptr.dtype.element_ty), mask=inside)
        y = x * r * weight[None, :]
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def rms_norm_bwd_kernel(
    grad_ptr,  # (N, C)
    addend_ptr,  # (N, C), added to dx: the residual stream's own gradient; only if HAS_ADDEND
    x_ptr,  # (N, C)
    weight_ptr,  # (C,)
    dx_ptr,  # (N, C) contiguous
    partial_ptr,  # (programs, C) float32
    N,
    C,
    n1,
    n2,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_a0,
    stride_a1,
    stride_a2,
    stride_x0,
    stride_x1,
    stride_x2,
    eps,
    HAS_ADDEND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    step = tl.num_programs(0) * BLOCK_N
    column = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_C,), tl.float32)
    for begin in range(program * BLOCK_N, N, step):
        row = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < N) & (column[None, :] < C)
        x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
        x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        g_row = grad_ptr + row_offset(row, n1, n2, stride_g0, stride_g1, stride_g2)
        g = tl.load(g_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        x_hat = x * r
        gw = g * weight[None, :]
        dx = r * (gw - x_hat * (tl.sum(gw * x_hat, axis=1) / C)[:, None])
        if HAS_ADDEND:
            a_row = addend_ptr + row_offset(row, n1, n2, stride_a0, stride_a1, stride_a2)
            dx += tl.load(a_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dx_row = dx_ptr + row * C
        tl.store(dx_row[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += tl.sum(g * r * x, axis=0)
    tl.store(partial_ptr + program * C + column, dw, mask=column < C)


@triton.jit(do_not_specialize=["N"])
def rms_norm_bwd_wide_kernel(
    grad_ptr,  # (N, C)
    addend_ptr,  # (N, C), added to dx; only if HAS_ADDEND
    x_ptr,  # (N, C)
    weight_ptr,  # (C,)
    dx_ptr,  # (N, C) contiguous
    partial_ptr,  # (programs, C) float32, zeros before
    N,
    C,
    n1,
    n2,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_a0,
    stride_a1,
    stride_a2,
    stride_x0,
    stride_x1,
    stride_x2,
    eps,
    HAS_ADDEND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rms_norm_bwd_kernel for rows that do not fit into registers."""
    program = tl.program_id(0)
    dw_row = partial_ptr + program * C
    for begin in range(program * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        row = tl.cast(begin, tl.int64) + tl.arange(0, BLOCK_N)
        x_row = x_ptr + row_offset(row, n1, n2, stride_x0, stride_x1, stride_x2)
        g_row = grad_ptr + row_offset(row, n1, n2, stride_g0, stride_g1, stride_g2)
        a_row = addend_ptr + row_offset(row, n1, n2, stride_a0, stride_a1, stride_a2)
        squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # of x
        shared = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # of g · w and x
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = (row[:, None] < N) & (column[None, :] < C)
            x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            g = tl.load(g_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
            squares += x * x
            shared += g * weight[None, :] * x
        r = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)[:, None]
        mean = (tl.sum(shared, axis=1) / C)[:, None] * r  # of g · w · x̂
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = (row[:, None] < N) & (column[None, :] < C)
            x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            g = tl.load(g_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
            dx = r * (g * weight[None, :] - x * r * mean)
            if HAS_ADDEND:
                a = tl.load(a_row[:, None] + column[None, :], mask=inside, other=0.0)
                dx += a.to(tl.float32)
            out = row[:, None] * C + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dw = tl.load(dw_row + column, mask=column < C, other=0.0)
            dw += tl.sum(g * r * x, axis=0)
            tl.store(dw_row + column, dw, mask=column < C)
        # A thread may add to what another has stored in the round before.
        tl.debug_barrier()


@dataclass(frozen=True)
class NormConfig:
    """block_n rows at a time by num_warps warps."""

    block_n: int = knob(1, 64)
    num_warps: int = knob(1, 32)


@dataclass(frozen=True)
class NormWideConfig(NormConfig):
    """As NormConfig, in chunks of block_c columns."""

    block_c: int = knob(64, 16384)


@dataclass(frozen=True)
class NormBackwardConfig:
    """As NormConfig; the programs of a processor share the rows, and each walks its own. Rows
    beyond BACKWARD_WHOLE are taken in chunks of block_c."""

    block_n: int = knob(1, 64)
    num_warps: int = knob(1, 32)
    programs: int = knob(1, 32)
    block_c: int = knob(64, 16384, default=0)


def forward_config(C: int, dtype: torch.dtype) -> NormConfig:
    """2048 elements a program or a row, 64 bytes a thread: many loads on the way, few registers."""
    block_c = next_power_of_2(C)
    block_n = max(1, min(16, 2048 // block_c))
    warps = block_n * block_c * dtype.itemsize // (64 * 32)
    return NormConfig(block_n, num_warps=min(16, max(1, warps)))


def backward_config(C: int, chip: Chip, dtype: torch.dtype) -> NormBackwardConfig:
    """Four live rows of float32 (x, g, w, dw): 16 elements of each a thread fill 64 registers."""
    if C > BACKWARD_WHOLE:
        return NormBackwardConfig(4, num_warps=8, programs=2, block_c=2048 // dtype.itemsize)
    block_c = next_power_of_2(C)
    block_n = max(1, min(16, 1024 // block_c))
    warps = min(16 if chip.amd else 32, max(1, block_n * block_c // (16 * chip.warp)))
    # Together the programs of a processor have 32 warps: what 64 registers a thread leave room for.
    return NormBackwardConfig(block_n, warps, programs=max(1, min(8, 32 // warps)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As llama_fast.ops.rms_norm."""
    C = x.shape[-1]
    if C > FORWARD_WHOLE:
        return forward_wide(x, None, weight, eps)[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    N, n1, n2, (stride_x,) = rows(x)
    config = chosen(
        "rms_norm",
        "rms_norm_fwd",
        chip_of(x),
        forward_config(C, x.dtype),
        C=C,
        dtype=TYPES[x.dtype],
    )
    launch(
        rms_norm_fwd_kernel,
        (-(-N // config.block_n),),
        x,
        weight,
        y,
        N,
        C,
        n1,
        n2,
        *stride_x,
        eps,
        BLOCK_N=config.block_n,
        BLOCK_C=next_power_of_2(C),
        num_warps=config.num_warps,
    )
    return y


def forward_wide(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm of x + residual, x + residual), or (rms_norm of x, x)."""
    C = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    has_residual = residual is not None
    total = torch.empty_like(y) if has_residual else x
    N, n1, n2, strides = rows(x, residual if has_residual else x)
    default = NormWideConfig(1, num_warps=8, block_c=8192 // x.dtype.itemsize)
    config = chosen("rms_norm", "rms_norm_fwd_wide", chip_of(x), default, C=C, dtype=TYPES[x.dtype])
    launch(
        rms_norm_fwd_wide_kernel,
        (-(-N // config.block_n),),
        x,
        residual if has_residual else x,
        weight,
        y,
        total,
        N,
        C,
        n1,
        n2,
        *strides[0],
        *strides[1],
        eps,
        HAS_RESIDUAL=has_residual,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return y, total


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op rms_norm_backward of llama_fast.ops.rms_norm."""
    return backward(grad, None, x, weight, eps)


def backward(
    grad: torch.Tensor,
    addend: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx + addend, dw); x is what was normalised."""
    C, chip = x.shape[-1], chip_of(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    has_addend = addend is not None
    N, n1, n2, strides = rows(grad, addend if has_addend else grad, x)
    config = chosen(
        "rms_norm",
        "rms_norm_bwd",
        chip,
        backward_config(C, chip, x.dtype),
        C=C,
        dtype=TYPES[x.dtype],
    )
    programs = max(1, min(config.programs * chip.processors, -(-N // config.block_n)))
    wide = C > BACKWARD_WHOLE
    partial = (torch.zeros if wide else torch.empty)(
        (programs, C), dtype=torch.float32, device=x.device
    )
    launch(
        rms_norm_bwd_wide_kernel if wide else rms_norm_bwd_kernel,
        (programs,),
        grad,
        addend if has_addend else grad,
        x,
        weight,
        dx,
        partial,
        N,
        C,
        n1,
        n2,
        *strides[0],
        *strides[1],
        *strides[2],
        eps,
        HAS_ADDEND=has_addend,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c if wide else next_power_of_2(C),
        num_warps=config.num_warps,
    )
    sum_rows(partial, dw)
    return dx, dw


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for C, dtype in row_sizes(models, brief):
        x, weight = empty(B, T, C, dtype=dtype), empty(C, dtype=dtype)
        yield "rms_norm", (x, weight, 1e-5)
        if C != WIDE:
            yield "rms_norm_backward", (x, x, weight, 1e-5)


def row_sizes(models: list[Dims], brief: bool) -> Iterator[tuple[int, torch.dtype]]:
    yield from ((dims.C, HALF) for dims in models)
    if not brief:
        yield from ((C, FULL) for C in WIDTHS)
        yield from ((WIDE, dtype) for dtype in (HALF, FULL))
