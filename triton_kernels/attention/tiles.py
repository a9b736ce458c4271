"""What the kernels of attention share: lengths and documents, loads of tiles, and P made again from
lse."""

from __future__ import annotations

import math

import triton
import triton.language as tl

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
def rows_of_queries(m, length, T, G: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows from m on, a query head of a token each: (row, its token, how many keys it sees),
    and the fewest and most keys that one of them sees."""
    row = m + tl.arange(0, BLOCK_M)
    t = tl.minimum(row // G, T - 1)
    seen = visible(t, length, T, CAUSAL)
    least = tl.maximum(visible(m // G, length, T, CAUSAL), 0)
    most = tl.maximum(visible(tl.minimum((m + BLOCK_M - 1) // G, T - 1), length, T, CAUSAL), 0)
    return row, t, seen, least, most


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
