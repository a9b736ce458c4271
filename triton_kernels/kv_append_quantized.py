"""Rotates the new tokens' queries and keys, and writes keys and values into a cache in 8 bits.

    scale = max |x| / 127        code = x / scale, rounded to even

for each head's vector x of a token: of a key that was rotated and rounded to its dtype, or of a
value. A vector of zeros has the scale 0; one that holds an infinity or NaN has the scale infinity.
The codes of both are 0.

One launch for q, k and v: a program takes one token, as in kv_append, which says where it is
stored. Heads are kept in registers between their scale and their codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen
from .kv_append import find_slot
from .launch import launch, next_power_of_2
from .rope import config_for, load_pairs, rotate, rotate_heads, store_pairs

# Added to a float32 below 2²², it leaves no bits for a fraction: the sum is rounded to even.
WHOLE = tl.constexpr(1.5 * 2**23)


@triton.jit
def magnitude(x):
    return tl.where(x == x, tl.abs(x), float("inf"))  # a maximum would pass over NaN


@triton.jit
def code(x, scale):
    """Codes of x (heads, pairs), as float32. Divisions are exact, so that codes are the same
    wherever the numbers are."""
    codable = ((scale > 0) & (scale < float("inf")))[:, None]
    rounded = tl.div_rn(tl.where(codable, x, 0.0), tl.where(codable, scale[:, None], 1.0))
    rounded = (rounded + WHOLE) - WHOLE
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0)  # of subnormal scales it may be beyond


@triton.jit
def quantize_heads(
    x_ptr,  # (heads, D), with stride_xh between heads
    codes_ptr,  # (heads, D) int8, with stride_ch between heads
    scales_ptr,  # (heads,) float32, with stride_sh between heads
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
    """The heads of one token, rotated if asked for, as codes and scales."""
    for begin in range(0, heads, BLOCK_H):
        head = (begin + tl.arange(0, BLOCK_H)).to(tl.int64)
        a, b = load_pairs(x_ptr, head, stride_xh, heads, pairs, INTERLEAVED, BLOCK_P)
        if ROTATE:
            a, b = rotate(a, b, cos, sin)
            dtype = x_ptr.dtype.element_ty
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        largest = tl.max(tl.maximum(magnitude(a), magnitude(b)), axis=1)
        scale = tl.div_rn(largest, 127.0)
        a, b = code(a, scale), code(b, scale)
        store_pairs(codes_ptr, a, b, head, stride_ch, heads, pairs, INTERLEAVED, BLOCK_P)
        tl.store(scales_ptr + head * stride_sh, scale, mask=head < heads)


@triton.jit(do_not_specialize=["T", "slots"])
def kv_append_quantized_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, T, K, D)
    v_ptr,  # (B, T, K, D)
    cos_ptr,  # (positions, D/2) float32
    sin_ptr,
    k_codes_ptr,  # (B, S, K, D) int8, written
    k_scales_ptr,  # (B, S, K) float32, written
    v_codes_ptr,  # (B, S, K, D) int8, written
    v_scales_ptr,  # (B, S, K) float32, written
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
        k_codes_ptr + b * stride_kcb + slot * stride_kcs,
        k_scales_ptr + b * stride_ksb + slot * stride_kss,
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
        v_codes_ptr + b * stride_vcb + slot * stride_vcs,
        v_scales_ptr + b * stride_vsb + slot * stride_vss,
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


def kv_append_quantized(
    q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved
) -> torch.Tensor:
    """As llama_fast.ops.kv_append_quantized; rows that are too long are not stored, rather than
    refused."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    config = chosen(
        "kv_append_quantized",
        "kv_append_quantized",
        chip_of(q),
        config_for(H, K, D),
        H=H,
        K=K,
        D=D,
    )
    launch(
        kv_append_quantized_kernel,
        (B * T,),
        q,
        k,
        v,
        cos,
        sin,
        k_codes,
        k_scales,
        v_codes,
        v_scales,
        lengths,
        q_out,
        T,
        H,
        K,
        D // 2,
        min(k_codes.shape[1], cos.shape[0]),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        cos.stride(0),
        sin.stride(0),
        *k_codes.stride()[:3],
        *k_scales.stride(),
        *v_codes.stride()[:3],
        *v_scales.stride(),
        lengths.stride(0),
        INTERLEAVED=interleaved,
        BLOCK_H=config.block_h,
        BLOCK_K=config.block_k,
        BLOCK_P=next_power_of_2(D // 2),
        num_warps=config.num_warps,
    )
    return q_out
