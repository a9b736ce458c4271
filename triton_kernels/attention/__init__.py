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

`tiles.py` is what the kernels share, `forward.py` and `backward.py` are these with their launchers,
`configs.py` says how they are launched.

Shapes: q, o (B, T, H, D), k, v (B, S, K, D), lse (B, H, T) float32, or float64 beside float32;
delta (B, H, T) float32; scales of 8-bit k and v (B, S, K) float32; G = H / K.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..shapes import FULL, HALF, B, Dims, T, cache, empty, heads, quantized
from .backward import attention_backward
from .configs import AttentionConfig
from .forward import attention

__all__ = ["AttentionConfig", "aot_calls", "attention", "attention_backward"]


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
