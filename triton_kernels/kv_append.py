"""Rotates the new tokens' queries and keys, and writes keys and values into the cache.

Token t of row b has the position p = lengths[b] - T + t, which is also its slot in the cache. Where
p is negative (padding on the left) or beyond the cache or the tables, nothing is stored and q' is
0.

One launch for q, k and v: a program takes one token, as in rope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen
from .launch import launch, next_power_of_2
from .rope import config_for, rotate_heads


@triton.jit
def find_slot(lengths_ptr, b, t, T, slots, stride_l):
    """(known, slot) of token t of row b: 1 and where it is stored, or 0 and 0.

    A token without a slot has no keys and values, and queries of zero: none of its heads is known.
    (A count: Triton's interpreter makes no mask of a block of conditions and a single one.)
    A row of no tokens or less stores none; a length near the least integer must not wrap around.
    """
    position = tl.maximum(tl.load(lengths_ptr + b * stride_l), 0) - T + t
    known = tl.where((position < 0) | (position >= slots), 0, 1)
    return known, known * position


@triton.jit(do_not_specialize=["T", "slots"])
def kv_append_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, T, K, D)
    v_ptr,  # (B, T, K, D)
    cos_ptr,  # (positions, D/2) float32
    sin_ptr,
    k_cache_ptr,  # (B, S, K, D), written
    v_cache_ptr,  # (B, S, K, D), written
    lengths_ptr,  # (B,) int64: valid keys after the append
    q_out_ptr,  # (B, T, H, D) contiguous
    T,
    H,
    K,
    pairs,
    slots,  # min(S, positions)
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_cp,
    stride_sp,
    stride_kcb,
    stride_kcs,
    stride_kch,
    stride_vcb,
    stride_vcs,
    stride_vch,
    stride_l,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    known, slot = find_slot(lengths_ptr, b, t, T, slots, stride_l)
    known_h = known * H
    known_k = known * K

    pair = tl.arange(0, BLOCK_P)
    table = pair < known * pairs
    cos = tl.load(cos_ptr + slot * stride_cp + pair, mask=table, other=0.0)
    sin = tl.load(sin_ptr + slot * stride_sp + pair, mask=table, other=0.0)
    D = 2 * pairs
    rotate_heads(
        q_ptr + b * stride_qb + t * stride_qt,
        q_out_ptr + token * H * D,
        stride_qh,
        D,
        H,
        known_h,
        pairs,
        cos,
        sin,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_P,
    )
    rotate_heads(
        k_ptr + b * stride_kb + t * stride_kt,
        k_cache_ptr + b * stride_kcb + slot * stride_kcs,
        stride_kh,
        stride_kch,
        known_k,
        known_k,
        pairs,
        cos,
        sin,
        INTERLEAVED,
        BLOCK_K,
        BLOCK_P,
    )
    element = tl.arange(0, 2 * BLOCK_P)
    v_row = v_ptr + b * stride_vb + t * stride_vt
    cache_row = v_cache_ptr + b * stride_vcb + slot * stride_vcs
    for begin in range(0, known_k, BLOCK_K):
        head = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
        inside = (head < known_k) & (element[None, :] < D)
        v = tl.load(v_row + head * stride_vh + element[None, :], mask=inside)
        tl.store(cache_row + head * stride_vch + element[None, :], v, mask=inside)


def kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> torch.Tensor:
    """As llama_fast.ops.kv_append; rows that are too long are not stored, rather than refused."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    config = chosen("kv_append", "kv_append", chip_of(q), config_for(H, K, D), H=H, K=K, D=D)
    launch(
        kv_append_kernel,
        (B * T,),
        q,
        k,
        v,
        cos,
        sin,
        k_cache,
        v_cache,
        lengths,
        q_out,
        T,
        H,
        K,
        D // 2,
        min(k_cache.shape[1], cos.shape[0]),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        cos.stride(0),
        sin.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        lengths.stride(0),
        INTERLEAVED=interleaved,
        BLOCK_H=config.block_h,
        BLOCK_K=config.block_k,
        BLOCK_P=next_power_of_2(D // 2),
        num_warps=config.num_warps,
    )
    return q_out
