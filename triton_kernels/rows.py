"""Tensors as rows of their last dim, whatever the strides of the others.

Row r of a tensor of outer dims (n0, n1, n2) begins at

    (r // n2 // n1) · stride0 + (r // n2 % n1) · stride1 + (r % n2) · stride2

A contiguous tensor has n1 = n2 = 1: Triton makes constants of arguments that are 1, so its rows
cost no division.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen, knob
from .launch import launch, next_power_of_2

MAX_OUTER = 3


@triton.jit
def row_offset(row, n1, n2, stride0, stride1, stride2):
    """Elements from the tensor's start to row `row`, which is int64."""
    outer = row // n2
    return (outer // n1) * stride0 + (outer % n1) * stride1 + (row % n2) * stride2


def outer_dims(*tensors: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest outer dims with which all of the tensors, of one shape, can be walked, and their
    strides: ((n0, n1, …), [(stride0, stride1, …) of each tensor])."""
    if all(x.is_contiguous() for x in tensors):
        x = tensors[0]
        C = x.shape[-1]
        return (x.numel() // C if C else 0,), [(C,)] * len(tensors)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim in range(tensors[0].ndim - 1):
        n, steps = tensors[0].shape[dim], [x.stride(dim) for x in tensors]
        if n == 1:
            continue
        if sizes and all(s[-1] == n * step for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= n
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(n)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    return tuple(sizes), [tuple(s) for s in strides]


def rows(*tensors: torch.Tensor) -> tuple[int, int, int, list[tuple[int, int, int]]]:
    """(N, n1, n2, strides of each tensor) as `row_offset` takes them; N rows in all."""
    sizes, strides = outer_dims(*tensors)
    N = 1
    for n in sizes:
        N *= n
    missing = MAX_OUTER - len(sizes)
    # The dims that a tensor lacks are its inner ones, of size 1.
    sizes = (*sizes, *(1,) * missing)
    return N, sizes[1], sizes[2], [(*s, *(0,) * missing) for s in strides]


def too_many_dims(**tensors: torch.Tensor) -> list[str]:
    """Why tensors of one shape cannot be walked as rows, or nothing."""
    sizes, _ = outer_dims(*tensors.values())
    if len(sizes) <= MAX_OUTER:
        return []
    return [
        f"{' and '.join(tensors)} lie in {len(sizes)} outer dims that cannot be merged; "
        f"at most {MAX_OUTER}"
    ]


@triton.jit(do_not_specialize=["P"])
def sum_rows_kernel(
    partial_ptr,  # (P, C) float32, contiguous
    out_ptr,  # (C,)
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[c] = Σ_p partial[p, c], in one order: the second step of every gradient of a weight."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for begin in range(0, P, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < P) & (column[None, :] < C)
        total += tl.load(partial_ptr + p[:, None] * C + column[None, :], mask=inside, other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < C)


@dataclass(frozen=True)
class SumConfig:
    """Rows and columns of partial sums at a time, and the warps of a program."""

    block_p: int = knob(1, 128)
    block_c: int = knob(16, 1024)
    num_warps: int = knob(1, 16)


def sum_rows(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out (C,) = the sum of partial (P, C) float32 over P."""
    P, C = partial.shape
    default = SumConfig(16, min(128, next_power_of_2(C)), num_warps=4)
    config = chosen("rms_norm", "sum_rows", chip_of(partial), default, C=C)
    launch(
        sum_rows_kernel,
        (-(-C // config.block_c),),
        partial,
        out,
        P,
        C,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
