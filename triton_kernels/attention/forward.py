"""The forward kernels: o and lse tile by tile, and what adds up the parts of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chips import chip_of
from ..choice import chosen
from ..launch import TYPES, launch, next_power_of_2
from .configs import FEW_ROWS, CombineConfig, forward_config, int8_config, parts_for, split_scale
from .tiles import (
    LN_2,
    LOG2_E,
    load_by_tma,
    load_document,
    load_length,
    load_queries,
    load_scales,
    load_tile,
    rows_of_queries,
)


@triton.jit(do_not_specialize=["T", "S", "part"])
def attention_fwd_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, K, D)
    v_ptr,  # (B, S, K, D)
    k_tiles,  # where TMA, descriptors of k and v in tiles (1, BLOCK_N, 1, D)
    v_tiles,
    k_scales_ptr,  # where CODED, (B, S, K) float32
    v_scales_ptr,
    lengths_ptr,  # (B,) int64
    cu_seqlens_ptr,  # where DOCUMENTS, (B + 1,) int32
    o_ptr,  # (B, T, H, D) contiguous; where SPLIT, (parts, B, T, H, D) float32
    lse_ptr,  # (B, H, T); where SPLIT, (parts, B, H, T)
    unit,
    factor,
    T,
    S,
    K,
    D,
    part,  # keys of a part, a multiple of BLOCK_N
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ksb,
    stride_kss,
    stride_ksh,
    stride_vsb,
    stride_vss,
    stride_vsh,
    G: tl.constexpr,
    CODED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    NEED_LSE: tl.constexpr,
    SPLIT: tl.constexpr,
    ODD_D: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The last queries see the most keys: they go first, so that the programs end together.
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    row_T = T
    if DOCUMENTS:
        token, T = load_document(cu_seqlens_ptr, b, T)
        length, b = T, b * 0
        if m >= T * G:
            return
        q_ptr += token.to(tl.int64) * stride_qt
        k_ptr += token.to(tl.int64) * stride_ks
        v_ptr += token.to(tl.int64) * stride_vs
    else:
        token, length = 0, load_length(lengths_ptr, b, T, S, HAS_LENGTHS)
    rows = T * G
    d = tl.arange(0, BLOCK_D)
    row, t, seen, least, most = rows_of_queries(m, length, T, G, CAUSAL, BLOCK_M)

    begin = 0
    if SPLIT:
        begin = tl.program_id(2) * part
        least = tl.minimum(tl.maximum(least, begin), begin + part)
        most = tl.minimum(tl.maximum(most, begin), begin + part)
    whole = begin + (least - begin) // BLOCK_N * BLOCK_N  # every query sees the keys before it

    q_row = q_ptr + b * stride_qb + kv_head * G * stride_qh
    q = load_queries(q_row, row, d, rows, D, stride_qt, stride_qh, G)
    k_row = k_ptr + b * stride_kb + kv_head * stride_kh
    v_row = v_ptr + b * stride_vb + kv_head * stride_vh
    if CODED:
        k_scales_row = k_scales_ptr + b * stride_ksb + kv_head * stride_ksh
        v_scales_row = v_scales_ptr + b * stride_vsb + kv_head * stride_vsh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # As exact as lse: beside float32, the roundings of a sum over thousands of tiles would show.
    total = tl.zeros((BLOCK_M,), lse_ptr.dtype.element_ty)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    part_size = tl.zeros((BLOCK_M,), tl.float32)
    rest = factor * LOG2_E
    n = tl.arange(0, BLOCK_N)
    for masked in tl.static_range(2):  # the tiles that every query sees whole, then the others
        end = most if masked else whole
        for start in range(whole if masked else begin, end, BLOCK_N):
            if TMA and not masked:
                k = load_by_tma(k_tiles, b, start, kv_head, BLOCK_N, BLOCK_D)
            else:
                k = load_tile(k_row, start, n, d, end, D, stride_ks, masked, ODD_D)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            if CODED:
                s *= load_scales(k_scales_row, start, n, end, stride_kss, masked)[None, :]
            if masked:
                s = tl.where(start + n[None, :] < seen[:, None], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, axis=1) * unit)
            # A query that has seen no key yet, or none with a weight: -inf - -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2((s * unit - base[:, None]) * rest)
            correction = tl.exp2((top - base) * rest)
            total = total * correction + tl.sum(p, axis=1)
            if CODED:
                p *= load_scales(v_scales_row, start, n, end, stride_vss, masked)[None, :]
                if q.dtype == tl.float16:  # a product is at most 2^15 parts; parts have an inverse
                    old_size = part_size * correction
                    part_size = tl.maximum(tl.maximum(old_size, tl.max(p, axis=1) / 32768.0), 1e-37)
                    correction = old_size / part_size
                    p *= (1.0 / part_size)[:, None]
            acc = acc * correction[:, None]
            if TMA and not masked:
                v = load_by_tma(v_tiles, b, start, kv_head, BLOCK_N, BLOCK_D)
            else:
                v = load_tile(v_row, start, n, d, end, D, stride_vs, masked, ODD_D)
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
            top = new_top

    o = acc / tl.where(total == 0.0, 1.0, total).to(tl.float32)[:, None]
    if CODED and q.dtype == tl.float16:
        o *= part_size[:, None]
    H = K * G
    h = kv_head * G + row % G
    batch = b
    if SPLIT:
        batch += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // K)
    o_at = ((batch * row_T + token + t) * H + h) * D
    inside = (row[:, None] < rows) & (d[None, :] < D)
    tl.store(o_ptr + o_at[:, None] + d[None, :], o.to(o_ptr.dtype.element_ty), mask=inside)
    if NEED_LSE or SPLIT:
        dtype = lse_ptr.dtype.element_ty
        # -inf without a key, as log 0 is.
        lse = top.to(dtype) * factor + tl.log2(total.to(dtype)) * LN_2
        tl.store(lse_ptr + (batch * H + h) * row_T + token + t, lse, mask=row < rows)


@triton.jit(do_not_specialize=["parts", "N", "T"])
def attention_combine_kernel(
    part_o_ptr,  # (parts, N·D) float32
    part_lse_ptr,  # (parts, N)
    o_ptr,  # (B, T, H, D) contiguous
    lse_ptr,  # (B, H, T)
    parts,
    N,  # B·T·H
    T,
    H,
    D,
    NEED_LSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o = Σ_i w_i o_i / Σ_i w_i with w_i = exp(lse_i): a program for each query."""
    query = tl.program_id(0).to(tl.int64)  # of the (B, T, H) queries
    b, t, h = query // H // T, query // H % T, query % H
    lse_at = (b * H + h) * T + t
    i, d = tl.arange(0, BLOCK_P).to(tl.int64), tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + i * N + lse_at, mask=i < parts, other=float("-inf"))
    top = tl.max(lse, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(((lse - base) * LOG2_E).to(tl.float32))
    total = tl.sum(weight, axis=0)
    inside = (i[:, None] < parts) & (d[None, :] < D)
    o_at = (i * N + query) * D
    part_o = tl.load(part_o_ptr + o_at[:, None] + d[None, :], mask=inside, other=0.0)
    o = tl.sum(part_o * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + query * D + d, o.to(o_ptr.dtype.element_ty), mask=d < D)
    if NEED_LSE:
        tl.store(lse_ptr + lse_at, top + tl.log2(total.to(lse.dtype)) * LN_2)


def fits_tma(x: torch.Tensor) -> bool:
    """Whether TMA can copy tiles of x: rows begin at multiples of 16 bytes."""
    bytes_ = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    return x.numel() > 0 and x.stride(-1) == 1 and all(n % 16 == 0 for n in bytes_)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op attention of llama_fast.ops.attention: (o, lse)."""
    scales = None if k_scale is None else (k_scale, v_scale)
    config_for = forward_config if scales is None else int8_config
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    G, chip = H // K, chip_of(q)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    exact = torch.float64 if q.dtype == torch.float32 else torch.float32
    lse = torch.empty((B, H, T) if need_lse else 0, dtype=exact, device=q.device)
    block_d = max(16, next_power_of_2(D))
    config = chosen(
        "attention",
        "attention_fwd",
        chip,
        config_for(chip, T * G, block_d, q.dtype),
        rows=max(FEW_ROWS, min(128, next_power_of_2(T * G))),
        D=D,
        dtype=TYPES[q.dtype],
        **({} if scales is None else {"kv": "int8"}),
    )
    tiles = -(-T * G // config.block_m)
    sequences = B
    parts, part = parts_for(chip, tiles * B * K, S, config.block_n)
    if cu_seqlens is not None:
        cu_seqlens, sequences = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
        parts, part = 1, S
    split = parts > 1
    tiled = (None, None)
    if config.tma and cu_seqlens is None and D == block_d and fits_tma(k) and fits_tma(v):
        tile = [1, config.block_n, 1, D]
        tiled = [TensorDescriptor(x, [*x.shape], [*x.stride()], tile) for x in (k, v)]
    if split:
        part_o = torch.empty((parts, B, T, H, D), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((parts, B, H, T), dtype=exact, device=q.device)
    launch(
        attention_fwd_kernel,
        (tiles, sequences * K, parts),
        q,
        k,
        v,
        *tiled,
        *(scales or (None, None)),
        lengths,
        cu_seqlens,
        part_o if split else o,
        part_lse if split else lse,
        *split_scale(scale, D),
        T,
        S,
        K,
        D,
        part,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((*scales[0].stride(), *scales[1].stride()) if scales else (None,) * 6),
        G=G,
        CODED=scales is not None,
        CAUSAL=causal,
        HAS_LENGTHS=lengths is not None,
        DOCUMENTS=cu_seqlens is not None,
        NEED_LSE=need_lse,
        SPLIT=split,
        ODD_D=D != block_d,
        TMA=tiled[0] is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split:
        block_p = next_power_of_2(parts)
        combine = chosen(
            "attention", "attention_combine", chip, CombineConfig(4), parts=block_p, D=block_d
        )
        launch(
            attention_combine_kernel,
            (B * T * H,),
            part_o,
            part_lse,
            o,
            lse,
            parts,
            B * T * H,
            T,
            H,
            D,
            NEED_LSE=need_lse,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
            num_warps=combine.num_warps,
        )
    return o, lse
