"""Rotates the new tokens' queries and keys, and writes keys and values into the cache.

Token t of row b has the position p = lengths[b] - T + t, which is also its slot in the cache. Where
p is negative (padding on the left) or beyond the cache or the tables, nothing is stored and q' is
0.

One launch for q, k and v: a program takes one token, as in rope.

A cache in 8 bits holds each head's vector x of a key, rotated and rounded to its dtype, or of a
value, as
    scale = max |x| / 127        x / scale, rounded to even
A vector of zeros has the scale 0; one that holds an infinity or NaN has the scale infinity. The
values of both are 0. Heads are kept in registers between their scale and their values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen
from .launch import launch, next_power_of_2
from .rope import config_for, load_pairs, rotate, rotate_heads, store_pairs
from .shapes import FULL, B, Dims, T, cache, empty, heads, quantized

# Added to a float32 below 2²², it leaves no bits for a fraction: the sum is rounded to even.
WHOLE = tl.constexpr(1.5 * 2**23)


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


@triton.jit
def magnitude(x):
    return tl.where(x == x, tl.abs(x), float("inf"))  # a maximum would pass over NaN


@triton.jit
def to_int8(x, scale):
    """The 8-bit values of x (heads, pairs), as float32. Divisions are exact, so that they are the
    same wherever the numbers are."""
    sound = ((scale > 0) & (scale < float("inf")))[:, None]
    rounded = tl.div_rn(tl.where(sound, x, 0.0), tl.where(sound, scale[:, None], 1.0))
    rounded = (rounded + WHOLE) - WHOLE
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0)  # of subnormal scales it may be beyond


@triton.jit
def quantize_heads(
    x_ptr,  # (heads, D), with stride_xh between heads
    values_ptr,  # (heads, D) int8, with stride_ch between heads
    scale_ptr,  # (heads,) float32, with stride_sh between heads
    stride_xh,
    stride_ch,
    stride_sh,
    heads,
    pairs,  # D/2
    cos,  # (BLOCK_P,) float32; used if ROTATE
    sin,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The heads of one token, rotated if asked for, as 8-bit values and scales."""
    for begin in range(0, heads, BLOCK_H):
        head = (begin + tl.arange(0, BLOCK_H)).to(tl.int64)
        a, b = load_pairs(x_ptr, head, stride_xh, heads, pairs, INTERLEAVED, BLOCK_P)
        if ROTATE:
            a, b = rotate(a, b, cos, sin)
            dtype = x_ptr.dtype.element_ty
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        largest = tl.max(tl.maximum(magnitude(a), magnitude(b)), axis=1)
        scale = tl.div_rn(largest, 127.0)
        a, b = to_int8(a, scale), to_int8(b, scale)
        store_pairs(values_ptr, a, b, head, stride_ch, heads, pairs, INTERLEAVED, BLOCK_P)
        tl.store(scale_ptr + head * stride_sh, scale, mask=head < heads)


@triton.jit(do_not_specialize=["T", "slots"])
def kv_append_quantized_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, T, K, D)
    v_ptr,  # (B, T, K, D)
    cos_ptr,  # (positions, D/2) float32
    sin_ptr,
    k_cache_ptr,  # (B, S, K, D) int8, written
    k_scale_ptr,  # (B, S, K) float32, written
    v_cache_ptr,  # (B, S, K, D) int8, written
    v_scale_ptr,  # (B, S, K) float32, written
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
    stride_ksb,
    stride_kss,
    stride_ksh,
    stride_vcb,
    stride_vcs,
    stride_vch,
    stride_vsb,
    stride_vss,
    stride_vsh,
    stride_l,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    known, slot = find_slot(lengths_ptr, b, t, T, slots, stride_l)
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
        known * H,
        pairs,
        cos,
        sin,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_P,
    )
    quantize_heads(
        k_ptr + b * stride_kb + t * stride_kt,
        k_cache_ptr + b * stride_kcb + slot * stride_kcs,
        k_scale_ptr + b * stride_ksb + slot * stride_kss,
        stride_kh,
        stride_kch,
        stride_ksh,
        known * K,
        pairs,
        cos,
        sin,
        True,
        INTERLEAVED,
        BLOCK_K,
        BLOCK_P,
    )
    quantize_heads(
        v_ptr + b * stride_vb + t * stride_vt,
        v_cache_ptr + b * stride_vcb + slot * stride_vcs,
        v_scale_ptr + b * stride_vsb + slot * stride_vss,
        stride_vh,
        stride_vch,
        stride_vsh,
        known * K,
        pairs,
        cos,
        sin,
        False,
        False,
        BLOCK_K,
        BLOCK_P,
    )


def kv_append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale=None, v_scale=None
) -> torch.Tensor:
    """As llama_fast.ops.kv_append; rows that are too long are not stored, rather than refused."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if k_scale is None:
        kernel, caches = kv_append_kernel, (k_cache, v_cache)
        strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    else:
        kernel, caches = kv_append_quantized_kernel, (k_cache, k_scale, v_cache, v_scale)
        strides = (
            *k_cache.stride()[:3], *k_scale.stride(), *v_cache.stride()[:3], *v_scale.stride()
        )  # fmt: skip
    name = kernel.__name__.removesuffix("_kernel")
    config = chosen("kv_append", name, chip_of(q), config_for(H, K, D), H=H, K=K, D=D)
    launch(
        kernel,
        (B * T,),
        q,
        k,
        v,
        cos,
        sin,
        *caches,
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
        *strides,
        lengths.stride(0),
        INTERLEAVED=interleaved,
        BLOCK_H=config.block_h,
        BLOCK_K=config.block_k,
        BLOCK_P=next_power_of_2(D // 2),
        num_warps=config.num_warps,
    )
    return q_out


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for dims in models:
        table, lengths = empty(T, dims.D // 2, dtype=FULL), empty(B, dtype=torch.int64)
        given, caches = (*heads(dims), table, table), cache(dims)
        yield "kv_append", (*given, *caches, lengths, False)
        (k8, k_scale), (v8, v_scale) = map(quantized, caches)
        for interleaved in (False, True):
            yield "kv_append", (*given, k8, v8, lengths, interleaved, k_scale, v_scale)
