"""Rotary position embedding: a' = a · cos θ - b · sin θ and b' = b · cos θ + a · sin θ.

(a, b) are elements i and i + D/2 of a head, or 2i and 2i + 1 where INTERLEAVED. Backward is the
rotation by -θ, so there is no second kernel.

Bound by memory: a program takes one token, loads its row of the tables once and rotates all of its
heads, of q and then of k, a block of heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen, knob
from .launch import launch, next_power_of_2
from .shapes import FULL, Dims, T, empty, heads


@triton.jit
def interleaved_pairs(head, stride_h, heads, pairs, BLOCK_P: tl.constexpr):
    """(offsets, mask) of the pairs of some heads as they lie in memory, (heads, pairs, 2)."""
    pair = tl.arange(0, BLOCK_P)[None, :, None]
    head = head[:, None, None]
    at = head * stride_h + 2 * pair + tl.arange(0, 2)[None, None, :]
    return at, tl.broadcast_to((head < heads) & (pair < pairs), at.shape)


@triton.jit
def load_pairs(
    x_ptr, head, stride_xh, heads, pairs, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr
):
    """(a, b) of each pair of these heads of one token, float32; zeros from `heads` on."""
    if INTERLEAVED:
        at, inside = interleaved_pairs(head, stride_xh, heads, pairs, BLOCK_P)
        return tl.split(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32))
    else:
        pair = tl.arange(0, BLOCK_P)
        at = head[:, None] * stride_xh + pair[None, :]
        inside = (head[:, None] < heads) & (pair[None, :] < pairs)
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + pairs, mask=inside, other=0.0).to(tl.float32)
        return a, b


@triton.jit
def store_pairs(
    y_ptr, a, b, head, stride_yh, heads, pairs, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The reverse of load_pairs."""
    if INTERLEAVED:
        at, inside = interleaved_pairs(head, stride_yh, heads, pairs, BLOCK_P)
        tl.store(y_ptr + at, tl.join(a, b).to(y_ptr.dtype.element_ty), mask=inside)
    else:
        pair = tl.arange(0, BLOCK_P)
        at = head[:, None] * stride_yh + pair[None, :]
        inside = (head[:, None] < heads) & (pair[None, :] < pairs)
        tl.store(y_ptr + at, a.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + at + pairs, b.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate(a, b, cos, sin):
    return a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :]


@triton.jit
def rotate_heads(
    x_ptr,  # (heads, D), with stride_xh between heads
    y_ptr,  # (heads, D), with stride_yh between heads
    stride_xh,
    stride_yh,
    heads,
    known,  # heads of x that are read; the others count as zeros
    pairs,  # D/2
    cos,  # (BLOCK_P,) float32
    sin,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = x rotated: the heads of one token. The kernels that append to a cache use it too."""
    for begin in range(0, heads, BLOCK_H):
        head = (begin + tl.arange(0, BLOCK_H)).to(tl.int64)
        a, b = load_pairs(x_ptr, head, stride_xh, known, pairs, INTERLEAVED, BLOCK_P)
        a, b = rotate(a, b, cos, sin)
        store_pairs(y_ptr, a, b, head, stride_yh, heads, pairs, INTERLEAVED, BLOCK_P)


@triton.jit(do_not_specialize=["T"])
def rope_fwd_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, T, K, D)
    cos_ptr,  # (B, T, D/2) float32; stride_cb is 0 where rows share positions
    sin_ptr,
    q_out_ptr,  # (B, T, H, D) contiguous
    k_out_ptr,  # (B, T, K, D) contiguous
    T,
    H,
    K,
    pairs,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_cb,
    stride_ct,
    stride_sb,
    stride_st,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    pair = tl.arange(0, BLOCK_P)
    cos = tl.load(cos_ptr + b * stride_cb + t * stride_ct + pair, mask=pair < pairs, other=0.0)
    sin = tl.load(sin_ptr + b * stride_sb + t * stride_st + pair, mask=pair < pairs, other=0.0)
    D = 2 * pairs
    rotate_heads(
        q_ptr + b * stride_qb + t * stride_qt,
        q_out_ptr + token * H * D,
        stride_qh,
        D,
        H,
        H,
        pairs,
        cos,
        sin,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_P,
    )
    rotate_heads(
        k_ptr + b * stride_kb + t * stride_kt,
        k_out_ptr + token * K * D,
        stride_kh,
        D,
        K,
        K,
        pairs,
        cos,
        sin,
        INTERLEAVED,
        BLOCK_K,
        BLOCK_P,
    )


@dataclass(frozen=True)
class RopeConfig:
    """Heads of q and of k that a program rotates at a time, and its warps."""

    block_h: int = knob(1, 128)
    block_k: int = knob(1, 128)
    num_warps: int = knob(1, 16)


def config_for(H: int, K: int, D: int) -> RopeConfig:
    """At most 2048 pairs at a time, 4 a thread, or 8 where 8 warps are not enough."""
    most = max(1, 2048 // next_power_of_2(D // 2))
    block_h = min(next_power_of_2(H), most)
    warps = min(8, max(1, block_h * next_power_of_2(D // 2) // (4 * 32)))
    return RopeConfig(block_h, min(next_power_of_2(K), most), warps)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As llama_fast.ops.rope."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    of_rows = cos.ndim == 3
    config = chosen("rope", "rope_fwd", chip_of(q), config_for(H, K, D), H=H, K=K, D=D)
    launch(
        rope_fwd_kernel,
        (B * T,),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        T,
        H,
        K,
        D // 2,
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if of_rows else 0,
        cos.stride(-2),
        sin.stride(0) if of_rows else 0,
        sin.stride(-2),
        INTERLEAVED=interleaved,
        BLOCK_H=config.block_h,
        BLOCK_K=config.block_k,
        BLOCK_P=next_power_of_2(D // 2),
        num_warps=config.num_warps,
    )
    return q_out, k_out


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for dims in models:
        q, k, _ = heads(dims)
        table = empty(T, dims.D // 2, dtype=FULL)
        for interleaved in (False, True):
            yield "rope", (q, k, table, table, interleaved)
