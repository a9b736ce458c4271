"""Flash attention: o = softmax(scale · q kᵀ) v, tile by tile, without ever storing the scores.

**Online softmax.** A softmax over keys that come in tiles keeps, for each query, the largest
score so far (`top`), the sum of the weights (`total`) and the weighted sum of values (`acc`):

    p = exp(s - top')        top' = max(top, max s)        c = exp(top - top')
    total' = c · total + Σ p                               acc' = c · acc + p v

and ends with o = acc / total. The scale is in two factors, a power of two (`unit`), which rounds no
score, and `factor` in [1, 2): p = 2^((unit · s - top') · factor · log2 e). So the largest exponent
is 0 however large the scores are. Of scores times the whole scale the largest would be rounded, and
the multiply-add that subtracts it from the product would leave an exponent beyond a float.

**Rows.** The G query heads of a KV head see the same keys, so they share a tile: row r of the T·G
rows of a KV head is token r // G and query head r % G of the group. Keys and values are then read
once for all of them, in decoding as in training.

**Which keys.** Token t of a row of `length` keys sees the first `length - T + t + 1` of them if
causal (`visible`), else all. The tiles that every query of a program sees whole need no mask, and
come first; only those on the diagonal, and the last of a length, are masked.

**Copies.** Tiles of keys and values that need no mask may come by TMA (sm_90 and later): one thread
asks for a whole tile. The descriptor that says how tiles lie is made on the host and travels with
the launch's arguments, so it needs no memory of its own, which a CUDA graph or a second thread
would have to share.

**Few queries.** A decoding step has B·K tiles of queries, which would leave most of a GPU idle,
so the keys are cut into parts, one program each, and `attention_combine_kernel` adds them up.

**Keys and values in 8 bits** have a scale for each key, a and b, that leaves the inner sums:
s = a · (q · k) and acc' = c · acc + (p · b) v. The values are whole numbers that every dtype of q
holds exactly, so a tile is read once, as bytes, and multiplied as numbers of it; no memory is taken
for keys and values in q's dtype. Float16 has few exponents, and a key that a query attends to may
have a b far below the others', so there acc is in parts of the query's largest p · b so far
(`part_size`). What differs besides is how large a tile is best.

**Packed documents** (DOCUMENTS) are the batch: b is one of them, with its own tokens of one row.
A grid has a tile for each that a document as long as the row would have; those that are beyond the
end of theirs return at once, so no length is read back, and none sees another document's memory.

**Backward.** P = exp(s - lse) is made again from the lse of the forward pass, tile by tile:

    delta = Σ_d o · g        dP = g vᵀ        dS = P ∘ (dP - delta)
    dv = Pᵀ g                dk = scale · dSᵀ q                  dq = scale · dS k

Two kernels: one owns a tile of queries and walks the keys (dq), one owns a tile of keys and walks
the queries (dk, dv). It multiplies twice what one kernel could share, but each element is summed
by one program in one order: no atomics, the same bits each time.

Shapes: q, o (B, T, H, D), k, v (B, S, K, D), lse (B, H, T) float32, or float64 beside float32;
delta (B, H, T) float32; scales of 8-bit k and v (B, S, K) float32; G = H / K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .chips import Chip, chip_of
from .choice import chosen, knob
from .launch import TYPES, launch, next_power_of_2
from .shapes import FULL, HALF, B, Dims, T, cache, empty, heads, quantized

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_length(lengths_ptr, b, T, S, HAS_LENGTHS: tl.constexpr):
    """Valid keys of row b; within what k holds, whatever was given."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), -T), S).to(tl.int32)
    else:
        return S


@triton.jit
def load_document(cu_seqlens_ptr, b, T):
    """(its first token, how many it has) of document b; within the T of the row, whatever was
    given."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), begin), T)
    return begin, end - begin


@triton.jit
def visible(t, length, T, CAUSAL: tl.constexpr):
    """How many keys token t sees; zero or less where it sees none."""
    if CAUSAL:
        return length - T + t + 1
    else:
        return length + 0 * t


@triton.jit
def load_tile(ptr, first, n, d, end, D, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows first + n of (end, D), which lie `stride` apart, and its columns d; zeros outside.
    ROWS and COLUMNS say which of the two bounds can be passed at all."""
    at = ptr + tl.cast(first, tl.int64) * stride + n[:, None] * stride + d[None, :]
    if ROWS and COLUMNS:
        return tl.load(at, mask=(first + n[:, None] < end) & (d[None, :] < D), other=0.0)
    elif ROWS:
        return tl.load(at, mask=first + n[:, None] < end, other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=d[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_scales(ptr, first, n, end, stride, ROWS: tl.constexpr):
    """Those of the rows first + n of a tile, one each."""
    at = ptr + tl.cast(first, tl.int64) * stride + n * stride
    return tl.load(at, mask=first + n < end, other=0.0) if ROWS else tl.load(at)


@triton.jit
def load_by_tma(tiles, b, first, kv_head, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same tile, of row b of the batch and a KV head, where no bound is passed."""
    tile = tiles.load([b.to(tl.int32), first, kv_head.to(tl.int32), 0])
    return tl.reshape(tile, (ROWS, COLUMNS))


@triton.jit
def load_queries(ptr, row, d, row_count, D, stride_t, stride_h, G: tl.constexpr):
    """Rows of q, or of a tensor of its shape: (row, d), zeros outside."""
    at = (row // G).to(tl.int64) * stride_t + (row % G).to(tl.int64) * stride_h
    inside = (row[:, None] < row_count) & (d[None, :] < D)
    return tl.load(ptr + at[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_lse(ptr, inside, factor):
    """lse / factor as a sum of two float32. Where q is float32, lse is float64: its error is one of
    every weight of the row, and one rounding at the size of an exponent would exceed theirs."""
    lse = tl.load(ptr, mask=inside, other=1e30) / factor  # weights of zero for the rows outside
    high = lse.to(tl.float32)
    if lse.dtype == tl.float64:
        return high, (lse - high).to(tl.float32)
    else:
        return high, tl.zeros_like(high)


@triton.jit
def remake_weights(s, lse, lse_low, unit, factor):
    """P of a tile. No weight is above 1, though a score that is large, and rounded in another order
    than in the forward pass, may be above its lse."""
    return tl.exp2(tl.minimum((s * unit - lse - lse_low) * (factor * LOG2_E), 0.0))


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
    row, d = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    t = tl.minimum(row // G, T - 1)
    seen = visible(t, length, T, CAUSAL)
    least = tl.maximum(visible(m // G, length, T, CAUSAL), 0)
    most = tl.maximum(visible(tl.minimum((m + BLOCK_M - 1) // G, T - 1), length, T, CAUSAL), 0)

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
    row, d = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    t = tl.minimum(row // G, T - 1)
    seen = visible(t, length, T, CAUSAL)
    least = tl.maximum(visible(m // G, length, T, CAUSAL), 0)
    most = tl.maximum(visible(tl.minimum((m + BLOCK_M - 1) // G, T - 1), length, T, CAUSAL), 0)
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


@dataclass(frozen=True)
class AttentionConfig:
    """Rows of queries and of keys of a tile, the warps that share it, and tiles on the way;
    of the forward pass, whether they are copied by TMA."""

    block_m: int = knob(16, 256)
    block_n: int = knob(16, 256)
    num_warps: int = knob(1, 16)
    num_stages: int = knob(1, 5, step=1)
    tma: bool = False


@dataclass(frozen=True)
class CombineConfig:
    num_warps: int = knob(1, 16)


@dataclass(frozen=True)
class DeltaConfig:
    """Queries of a program, and its warps."""

    block_n: int = knob(1, 1024)
    num_warps: int = knob(1, 16)


FEW_ROWS = 16  # the fewest rows of a matrix instruction's tile
MAX_PARTS = 64
LEAST_PART = 256  # keys, below which a part costs more than it helps


def forward_config(chip: Chip, rows: int, D: int, dtype: torch.dtype) -> AttentionConfig:
    """`rows` is T·G, of one KV head; D is rounded up to a power of two.

    A tile of queries stays in registers or shared memory while tiles of k and v stream by, so its
    size decides how often k and v are read from L2, and the accumulator (block_m × D float32) how
    many registers are left: 128 × 128 takes 64 of each thread of 8 warps.
    """
    if dtype == torch.float32:  # multiply-adds without matrix instructions, which hold whole rows
        if D > 128:
            return AttentionConfig(16, 16, num_warps=4 if chip.amd else 16, num_stages=1)
        return AttentionConfig(16, 32, num_warps=8 if D > 64 else 4, num_stages=1)
    if rows <= FEW_ROWS:  # bound by memory: small tiles, several on the way
        stages = (3 if D > 128 or D <= 64 else 4) - (not chip.roomy)
        return AttentionConfig(FEW_ROWS, 32 if D > 64 else 64, 4, stages)
    if D > 128:
        return AttentionConfig(128 if chip.hopper and rows > 64 else 64, 32, 8, num_stages=2)
    # Registers hold both sides of mma.sync's products: wide heads leave room for 32 keys. So does
    # gfx942 for heads of any width.
    block_n = 64 if chip.hopper or (D <= 64 and not chip.amd) else 32
    if rows <= 64 or not chip.roomy or chip.amd:
        return AttentionConfig(64, block_n, num_warps=4, num_stages=2)
    return AttentionConfig(128, block_n, num_warps=8, num_stages=3)


def int8_config(chip: Chip, rows: int, D: int, dtype: torch.dtype) -> AttentionConfig:
    """For keys and values in 8 bits: as `forward_config` for few rows and in float32. The values
    become q's dtype in registers, so the other tiles are smaller, or shared by more warps; float16
    keeps a unit besides."""
    config = forward_config(chip, rows, D, dtype)
    if dtype == torch.float32 or rows <= FEW_ROWS:
        return config
    if D > 128:
        return replace(config, block_m=64, block_n=16)
    if chip.hopper:
        return replace(config, block_n=32) if rows <= 64 < D else config
    crowded = not chip.amd and (D > 64 or dtype == torch.float16)
    return replace(config, block_n=32, num_warps=8 if crowded else config.num_warps)


def backward_configs(
    chip: Chip, D: int, dtype: torch.dtype
) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the dk, dv kernel, which holds two accumulators of block_n × D, and of the dq kernel."""
    if dtype == torch.float32:
        if D > 128 and not chip.amd:
            return AttentionConfig(16, 16, 8, 1), AttentionConfig(16, 32, 16, 1)
        warps = 8 if 64 < D <= 128 else 4
        return AttentionConfig(16, 16, 4, 1), AttentionConfig(16, 16, warps, 1)
    warps = 8 if chip.arch == 80 and D > 64 else 4  # of dk and dv, for whose sums ptxas needs more
    if D > 128:
        return AttentionConfig(32, 32, warps, 1), AttentionConfig(32, 32, 4, num_stages=1)
    if not chip.hopper:
        return AttentionConfig(32, 64, warps, 1), AttentionConfig(64, 32, 4, num_stages=1)
    block_m = 32 if D > 64 else 64
    return AttentionConfig(block_m, 128, 8, num_stages=2), AttentionConfig(128, 64, 8, num_stages=2)


def parts_for(chip: Chip, programs: int, S: int, block_n: int) -> tuple[int, int]:
    """(parts, keys of each): as many parts as two programs a processor need, of LEAST_PART or more
    keys. It depends on S, not on lengths: those are not known here."""
    wanted = 2 * chip.processors // max(programs, 1)
    parts = max(1, min(wanted, MAX_PARTS, S // LEAST_PART))
    tiles = -(-S // block_n)
    part = -(-tiles // parts) * block_n
    return (-(-S // part) if part else 1), part


def split_scale(scale: float | None, D: int) -> tuple[float, float]:
    """(unit, factor): scale, or 1/√D without one, is their product, unit a power of two and factor
    in [1, 2)."""
    mantissa, exponent = math.frexp(D**-0.5 if scale is None else scale)
    return math.ldexp(1.0, exponent - 1), 2 * mantissa


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


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for dims in models:
        q, k, v = heads(dims)
        caches, lengths = cache(dims), empty(B, dtype=torch.int64)
        step = empty(B, 1, dims.H, dims.D)
        yield from training_calls(q, k, v)
        if not brief:
            row = q[:1], k[:1], v[:1]
            yield from training_calls(*row, empty(9, dtype=torch.int32))
        for queries in (step,) if brief else (q, q[:, :8], step):
            yield "attention", (queries, *caches, True, None, lengths, False)
        (k8, k_scale), (v8, v_scale) = map(quantized, caches)
        for queries in (q, step) if brief else (q, q[:, :8], step):
            yield "attention", (queries, k8, v8, True, None, lengths, False, k_scale, v_scale)
    if brief:
        return
    others = {HALF: (96, 256), torch.float16: (64, 128, 256), FULL: (64, 128, 256)}
    for dtype, D in ((dtype, D) for dtype, dims in others.items() for D in dims):
        q, k, v = (empty(B, T, heads, D, dtype=dtype) for heads in (8, 2, 2))
        yield from training_calls(q, k, v)
        for queries in (q[:, :8], q[:, :1]):
            yield "attention", (queries, k, v, True, None, None, False)
        (k8, k_scale), (v8, v_scale) = quantized(k), quantized(v)
        for queries in (q, q[:, :8], q[:, :1]):
            yield "attention", (queries, k8, v8, True, None, None, False, k_scale, v_scale)


def training_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> Iterator[tuple]:
    lse = empty(q.shape[0], q.shape[2], T, dtype=torch.float64 if q.dtype == FULL else FULL)
    yield "attention", (q, k, v, True, None, None, True, None, None, cu_seqlens)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    yield "attention_backward", (o, q, k, v, o, lse, True, None, None, cu_seqlens)
