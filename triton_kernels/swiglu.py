"""SwiGLU's elementwise part: h = silu(gate) · up, with silu(z) = z · s, s = σ(z) = 1 / (1 + e^-z).

Backward, with g the gradient of h:
    d_gate = g · up · s · (1 + gate · (1 - s))        d_up = g · silu(gate)

Bound by memory: each element is read once, and a thread holds 16 of them. gate and up may be two
halves of one (N, 2F) tensor: they have strides of rows of their own. Where everything is contiguous
the tensor is one long row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen, knob
from .launch import TYPES, launch, next_power_of_2
from .rows import row_offset, rows
from .shapes import FULL, WIDTHS, B, Dims, T, empty


@triton.jit(do_not_specialize=["N", "blocks"])
def swiglu_fwd_kernel(
    gate_ptr,  # (N, F)
    up_ptr,  # (N, F)
    h_ptr,  # (N, F) contiguous
    N,
    F,
    blocks,  # programs of a row
    n1,
    n2,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_u0,
    stride_u1,
    stride_u2,
    BLOCK_F: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    g_row = gate_ptr + row_offset(row, n1, n2, stride_g0, stride_g1, stride_g2)
    u_row = up_ptr + row_offset(row, n1, n2, stride_u0, stride_u1, stride_u2)
    gate = tl.load(g_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u_row + column, mask=inside, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h_ptr + row * F + column, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "blocks"])
def swiglu_bwd_kernel(
    grad_ptr,  # (N, F)
    gate_ptr,  # (N, F)
    up_ptr,  # (N, F)
    d_gate_ptr,  # (N, F) contiguous
    d_up_ptr,  # (N, F) contiguous
    N,
    F,
    blocks,
    n1,
    n2,
    stride_h0,
    stride_h1,
    stride_h2,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_u0,
    stride_u1,
    stride_u2,
    BLOCK_F: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    h_row = grad_ptr + row_offset(row, n1, n2, stride_h0, stride_h1, stride_h2)
    g_row = gate_ptr + row_offset(row, n1, n2, stride_g0, stride_g1, stride_g2)
    u_row = up_ptr + row_offset(row, n1, n2, stride_u0, stride_u1, stride_u2)
    grad = tl.load(h_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(g_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u_row + column, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    out = row * F + column
    d_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_ptr + out, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + out, (grad * gate * s).to(d_up_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class SwigluConfig:
    block_f: int = knob(128, 16384)
    num_warps: int = knob(1, 32)


def config_for(F: int) -> SwigluConfig:
    """16 elements a thread: two or four loads of 16 bytes of each tensor in flight."""
    for block_f in (256, 512, 1024):
        if F <= block_f:
            return SwigluConfig(block_f, num_warps=max(1, block_f // 512))
    return SwigluConfig(2048, num_warps=4)


def configured(kernel: str, F: int, x: torch.Tensor) -> SwigluConfig:
    width = min(4096, next_power_of_2(F))  # beyond it the length of a row decides nothing
    return chosen("swiglu", kernel, chip_of(x), config_for(F), F=width, dtype=TYPES[x.dtype])


def as_rows(*tensors: torch.Tensor) -> tuple[int, int, int, int, list[tuple[int, int, int]]]:
    """(N, F, n1, n2, strides); one row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return 1, tensors[0].numel(), 1, 1, [(0, 0, 0)] * len(tensors)
    N, n1, n2, strides = rows(*tensors)
    return N, tensors[0].shape[-1], n1, n2, strides


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As llama_fast.ops.swiglu."""
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    N, F, n1, n2, (stride_g, stride_u) = as_rows(gate, up)
    config = configured("swiglu_fwd", F, gate)
    blocks = -(-F // config.block_f)
    launch(
        swiglu_fwd_kernel,
        (N * blocks,),
        gate,
        up,
        h,
        N,
        F,
        blocks,
        n1,
        n2,
        *stride_g,
        *stride_u,
        BLOCK_F=config.block_f,
        num_warps=config.num_warps,
    )
    return h


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op swiglu_backward of llama_fast.ops.swiglu."""
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    d_up = torch.empty_like(d_gate)
    N, F, n1, n2, (stride_h, stride_g, stride_u) = as_rows(grad, gate, up)
    config = configured("swiglu_bwd", F, gate)
    blocks = -(-F // config.block_f)
    launch(
        swiglu_bwd_kernel,
        (N * blocks,),
        grad,
        gate,
        up,
        d_gate,
        d_up,
        N,
        F,
        blocks,
        n1,
        n2,
        *stride_h,
        *stride_g,
        *stride_u,
        BLOCK_F=config.block_f,
        num_warps=config.num_warps,
    )
    return d_gate, d_up


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for dims in models:
        gate, up = empty(B, T, 2 * dims.F).chunk(2, dim=-1)
        yield "swiglu", (gate, up)
        yield "swiglu_backward", (empty(B, T, dims.F), gate, up)
    for C in () if brief else WIDTHS:
        x = empty(B, T, C, dtype=FULL)
        yield "swiglu", (x, x)
        yield "swiglu_backward", (x, x, x)
