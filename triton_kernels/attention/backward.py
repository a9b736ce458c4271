"""The backward kernels: delta, dk and dv, dq."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..chips import chip_of
from ..choice import chosen
from ..launch import TYPES, launch, next_power_of_2
from .configs import DeltaConfig, backward_configs, split_scale
from .tiles import (
    load_document,
    load_length,
    load_lse,
    load_queries,
    load_tile,
    remake_weights,
    rows_of_queries,
    visible,
)


@triton.jit(do_not_specialize=["N", "T"])
def attention_delta_kernel(
    o_ptr,  # (B, T, H, D) contiguous
    grad_ptr,  # (B, T, H, D)
    delta_ptr,  # (B, H, T)
    N,  # B·T·H
    T,
    H,
    D,
    stride_gb,
    stride_gt,
    stride_gh,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = Σ_d o · grad, which is rowsum(P ∘ dP)."""
    query = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    b, t, h = query // H // T, query // H % T, query % H
    inside = (query[:, None] < N) & (d[None, :] < D)
    o = tl.load(o_ptr + (query * D)[:, None] + d[None, :], mask=inside, other=0.0)
    g_at = b * stride_gb + t * stride_gt + h * stride_gh
    g = tl.load(grad_ptr + g_at[:, None] + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta_ptr + (b * H + h) * T + t, delta, mask=query < N)


@triton.jit(do_not_specialize=["T", "S"])
def attention_bwd_dk_dv_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, K, D)
    v_ptr,  # (B, S, K, D)
    grad_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T)
    lengths_ptr,  # (B,) int64
    cu_seqlens_ptr,  # where DOCUMENTS, (B + 1,) int32
    dk_ptr,  # (B, S, K, D) contiguous
    dv_ptr,  # (B, S, K, D) contiguous
    unit,
    factor,
    T,
    S,
    K,
    D,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N  # the first keys are seen by the most queries: they go first
    b, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    row_T = T
    if DOCUMENTS:
        token, T = load_document(cu_seqlens_ptr, b, T)
        length, S, b = T, T, b * 0
        if first >= T:
            return
        q_ptr += token.to(tl.int64) * stride_qt
        k_ptr += token.to(tl.int64) * stride_ks
        v_ptr += token.to(tl.int64) * stride_vs
        grad_ptr += token.to(tl.int64) * stride_gt
    else:
        token, length = 0, load_length(lengths_ptr, b, T, S, HAS_LENGTHS)
    n, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Queries before `some` see no key of the tile; those from `all` on see each of them.
    some, whole = 0, 0
    if CAUSAL:
        some = tl.maximum(first - (length - T), 0)
        whole = tl.maximum(first + BLOCK_N - 1 - (length - T), 0)
    rows = T * G
    some = tl.minimum(some, T) * G // BLOCK_M * BLOCK_M
    whole = (tl.minimum(whole, T) * G + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if first + BLOCK_N > length:  # the tile ends behind the length: each query needs the mask
        whole = rows
    if first >= length:
        some = rows
    whole = tl.minimum(tl.maximum(whole, some), rows)

    inside = (n[:, None] < length) & (d[None, :] < D)
    key = n.to(tl.int64)[:, None]
    k_row = k_ptr + b * stride_kb + kv_head * stride_kh
    v_row = v_ptr + b * stride_vb + kv_head * stride_vh
    k = tl.load(k_row + key * stride_ks + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_row + key * stride_vs + d[None, :], mask=inside, other=0.0)
    q_row = q_ptr + b * stride_qb + kv_head * G * stride_qh
    g_row = grad_ptr + b * stride_gb + kv_head * G * stride_gh
    of_heads = (b * K + kv_head) * G * row_T + token
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for masked in tl.static_range(1, -1, -1):  # the queries on the diagonal, then the others
        for start in range(some if masked else whole, whole if masked else rows, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            q = load_queries(q_row, row, d, rows, D, stride_qt, stride_qh, G)
            g = load_queries(g_row, row, d, rows, D, stride_gt, stride_gh, G)
            at = of_heads + (row % G) * row_T + row // G
            lse, lse_low = load_lse(lse_ptr + at, row < rows, factor)
            delta = tl.load(delta_ptr + at, mask=row < rows, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = remake_weights(s, lse[None, :], lse_low[None, :], unit, factor)
            if masked:
                seen = tl.minimum(visible(row // G, length, T, CAUSAL), length)
                p = tl.where(n[:, None] < seen[None, :], p, 0.0)
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(g), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    inside = (n[:, None] < S) & (d[None, :] < D)
    at = ((b * S + token + n.to(tl.int64)) * K + kv_head) * D
    dk = (dk * (unit * factor)).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + at[:, None] + d[None, :], dk, mask=inside)
    tl.store(dv_ptr + at[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def attention_bwd_dq_kernel(
    q_ptr,  # (B, T, H, D)
    k_ptr,  # (B, S, K, D)
    v_ptr,  # (B, S, K, D)
    grad_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T)
    lengths_ptr,  # (B,) int64
    cu_seqlens_ptr,  # where DOCUMENTS, (B + 1,) int32
    dq_ptr,  # (B, T, H, D) contiguous
    unit,
    factor,
    T,
    S,
    K,
    D,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SUM_DELTA: tl.constexpr,  # this launch makes delta, by the same walk, and no dq
    ODD_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
        grad_ptr += token.to(tl.int64) * stride_gt
    else:
        token, length = 0, load_length(lengths_ptr, b, T, S, HAS_LENGTHS)
    rows = T * G
    d = tl.arange(0, BLOCK_D)
    row, t, seen, least, most = rows_of_queries(m, length, T, G, CAUSAL, BLOCK_M)
    whole = least // BLOCK_N * BLOCK_N

    q_row = q_ptr + b * stride_qb + kv_head * G * stride_qh
    g_row = grad_ptr + b * stride_gb + kv_head * G * stride_gh
    q = load_queries(q_row, row, d, rows, D, stride_qt, stride_qh, G)
    g = load_queries(g_row, row, d, rows, D, stride_gt, stride_gh, G)
    at = (b * K + kv_head) * G * row_T + (row % G) * row_T + token + t
    lse, lse_low = load_lse(lse_ptr + at, row < rows, factor)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if not SUM_DELTA:
        delta = tl.load(delta_ptr + at, mask=row < rows, other=0.0)
    k_row = k_ptr + b * stride_kb + kv_head * stride_kh
    v_row = v_ptr + b * stride_vb + kv_head * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    n = tl.arange(0, BLOCK_N)
    for masked in tl.static_range(2):  # the tiles that every query sees whole, then the others
        end = most if masked else whole
        for start in range(whole if masked else 0, end, BLOCK_N):
            k = load_tile(k_row, start, n, d, end, D, stride_ks, masked, ODD_D)
            v = load_tile(v_row, start, n, d, end, D, stride_vs, masked, ODD_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = remake_weights(s, lse[:, None], lse_low[:, None], unit, factor)
            if masked:
                p = tl.where(start + n[None, :] < seen[:, None], p, 0.0)
            dp = tl.dot(g, tl.trans(v), input_precision="ieee")
            if SUM_DELTA:
                delta += tl.sum(p * dp, axis=1)
            else:
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    if SUM_DELTA:
        tl.store(delta_ptr + at, delta, mask=row < rows)
    else:
        at = ((b * row_T + token + t) * (K * G) + kv_head * G + row % G) * D
        inside = (row[:, None] < rows) & (d[None, :] < D)
        dq = (dq * (unit * factor)).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + at[:, None] + d[None, :], dq, mask=inside)


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op attention_backward of llama_fast.ops.attention: (dq, dk, dv)."""
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    G, chip = H // K, chip_of(q)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(D))
    # Σ_d o · g and Σ P ∘ dP are equal but for their rounding. In float32, where that would be the
    # largest error (dS of a query that sees a single key is 0), the dq kernel sums the latter, in a
    # launch of its own: with both sums in one it would spill.
    exact = q.dtype == torch.float32
    if not exact:
        default = DeltaConfig(max(1, 4096 // block_d), num_warps=4)
        config = chosen("attention", "attention_delta", chip, default, D=block_d)
        launch(
            attention_delta_kernel,
            (-(-B * T * H // config.block_n),),
            o,
            grad,
            delta,
            B * T * H,
            T,
            H,
            D,
            *grad.stride()[:3],
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
        )
    sequences = B
    if cu_seqlens is not None:
        cu_seqlens, sequences = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
    given = (q, k, v, grad, lse, delta, lengths, cu_seqlens)
    sizes = (*split_scale(scale, D), T, S, K, D)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    same = {
        "G": G,
        "CAUSAL": causal,
        "HAS_LENGTHS": lengths is not None,
        "DOCUMENTS": cu_seqlens is not None,
        "BLOCK_D": block_d,
    }
    of_keys, of_queries = (
        chosen("attention", kernel, chip, config, D=D, dtype=TYPES[q.dtype])
        for kernel, config in zip(
            ("attention_bwd_dk_dv", "attention_bwd_dq"),
            backward_configs(chip, block_d, q.dtype),
            strict=True,
        )
    )
    for sum_delta in (True, False) if exact else (False,):
        launch(
            attention_bwd_dq_kernel,
            (-(-T * G // of_queries.block_m), sequences * K),
            *given,
            dq,
            *sizes,
            *strides,
            **same,
            SUM_DELTA=sum_delta,
            ODD_D=D != block_d,
            BLOCK_M=of_queries.block_m,
            BLOCK_N=of_queries.block_n,
            num_warps=of_queries.num_warps,
            num_stages=of_queries.num_stages,
        )
    launch(
        attention_bwd_dk_dv_kernel,
        (-(-S // of_keys.block_n), sequences * K),
        *given,
        dk,
        dv,
        *sizes,
        *strides,
        **same,
        BLOCK_M=of_keys.block_m,
        BLOCK_N=of_keys.block_n,
        num_warps=of_keys.num_warps,
        num_stages=of_keys.num_stages,
    )
    return dq, dk, dv
