"""Rotates the new tokens' queries and keys, and writes keys and values into the cache.

Token t of row b has the position p = lengths[b] - T + t, which is also its slot in the cache:
    q'[b,t] = rope(q[b,t], p)    k_cache[b,p] = rope(k[b,t], p)    v_cache[b,p] = v[b,t]

A batch of prompts of different lengths is padded on the left, so a position may be negative: such
a token is not stored, and its q' is 0.

Shapes    q (B,T,H,D), k and v (B,T,K,D), cos and sin (P, D/2) float32 with P the most positions,
          k_cache and v_cache (B,S,K,D), lengths (B,) int64: the valid keys of each row once the T
          tokens are stored → q' (B,T,H,D)
Layout    every tensor is contiguous in its last dim, with any stride in the others: q, k and v may
          be parts of one (B,T,(H+2K)·D) tensor, and the caches may lie as (B,K,S,D); q' is
          contiguous
Rounding  rotated in float32, rounded once, as in rope; v is copied

k_cache and v_cache are written; the op has no gradient. Train with rope.
"""

from __future__ import annotations

import torch

from ..dispatch import OPS, Case, Cost, Op
from ..errors import ShapeError
from . import checks
from .inputs import randn
from .quantized_kv import QuantizedKV, is_quantized
from .rope import check_tables, rotate, tables


def kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor | QuantizedKV,
    v_cache: torch.Tensor | QuantizedKV,
    lengths: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Appends T tokens to the cache of each row and returns their rotated queries.

    q                 (B,T,H,D), float32, bfloat16 or float16, D even
    k, v              (B,T,K,D), of q's dtype and device
    cos, sin          (P, D/2) float32: a row for each position
    k_cache, v_cache  (B,S,K,D), of q's dtype and device; written at each token's position. Or each
                      a QuantizedKV of that shape, which the op `kv_append_quantized` writes
    lengths           (B,) int64: valid keys of each row after the append, at most min(S, P)
    interleaved       whether the pairs are (2i, 2i + 1) rather than (i, i + D/2)
    Returns q' (B,T,H,D), contiguous; 0 for tokens at negative positions. Raises ShapeError when the
    arguments do not fit, and before anything is written when a row would end beyond the cache or
    the tables (on a GPU such tokens are not stored and their q' is 0, since to ask would be to
    wait).
    """
    if is_quantized("kv_append", k_cache, v_cache):
        append = OPS["kv_append_quantized"]
        return append(q, k, v, cos, sin, *k_cache, *v_cache, lengths, interleaved)
    return OP(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def check(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> None:
    checks.same_kind("kv_append", "q", q, k_cache=k_cache, v_cache=v_cache)
    check_tokens("kv_append", q, k, v, cos, sin, lengths)
    B, _, K, D = k.shape
    checks.ndim("kv_append", "k_cache", k_cache, 4, "(B, S, K, D)")
    checks.shape("kv_append", "k_cache", k_cache, (B, k_cache.shape[1], K, D), "(B, S, K, D)")
    checks.shape("kv_append", "v_cache", v_cache, k_cache.shape, "k_cache's shape")


def check_tokens(op: str, q, k, v, cos, sin, lengths) -> None:
    """What is appended, whatever the cache: everything but the caches."""
    checks.same_kind(op, "q", q, k=k, v=v)
    checks.heads(op, q, k=k)
    checks.shape(op, "v", v, k.shape, "k's shape")
    checks.ndim(op, "cos", cos, 2, "(P, D/2)")
    checks.shape(op, "cos", cos, (cos.shape[0], q.shape[-1] // 2), "(P, D/2)")
    checks.shape(op, "sin", sin, cos.shape, "cos's shape")
    check_tables(op, q, cos, sin)
    checks.lengths(op, lengths, q)


def too_long(row: int, length: int, S: int, P: int) -> ShapeError:
    return ShapeError(
        f"kv_append: lengths[{row}] is {length}, but the cache has S = {S} slots and the tables "
        f"P = {P} positions: make them longer, or append fewer tokens"
    )


def places(
    q: torch.Tensor, lengths: torch.Tensor, S: int, P: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, token and position of each token that is stored; raises ShapeError where one would lie
    beyond the cache of S slots or the tables of P positions."""
    T = q.shape[1]
    if lengths.is_cpu and (lengths > min(S, P)).any():  # elsewhere, to ask would be to wait
        row = int(lengths.argmax())
        raise too_long(row, int(lengths[row]), S, P)
    # A row of no tokens or less stores none; a length near the least integer must not wrap around.
    position = lengths[:, None].clamp(min=0) - T + torch.arange(T, device=q.device)  # (B, T)
    b, t = ((position >= 0) & (position < min(S, P))).nonzero(as_tuple=True)
    return b, t, position[b, t]


def eager(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> torch.Tensor:
    b, t, p = places(q, lengths, k_cache.shape[1], cos.shape[0])
    cos, sin = cos[p, None], sin[p, None]
    k_cache[b, p] = rotate(k[b, t], cos, sin, interleaved)
    v_cache[b, p] = v[b, t]
    rotated = q.new_zeros(q.shape)
    rotated[b, t] = rotate(q[b, t], cos, sin, interleaved)
    return rotated


def fake(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> torch.Tensor:
    return q.new_empty(q.shape)


def cost(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> Cost:
    B, T, _, D = q.shape
    return Cost(
        bytes=2 * (q.numel() + k.numel() + v.numel()) * q.element_size()
        + B * T * D * cos.element_size()
        + lengths.numel() * lengths.element_size(),
        flops=3 * (q.numel() + k.numel()),
    )


def cases() -> list[Case]:
    def append(lengths, T, H, K, D, *, S=24, interleaved=False, fused=True, heads_first=False):
        """`lengths` after the append of T tokens, for a cache of S slots."""

        def make(g, dtype, device):
            B = len(lengths)
            if fused:
                qkv = randn(g, B, T, (H + 2 * K) * D, dtype=dtype, device=device)
                q, k, v = qkv.unflatten(-1, (H + 2 * K, D)).split((H, K, K), dim=2)
            else:
                q = randn(g, B, T, H, D, dtype=dtype, device=device)
                k, v = (randn(g, B, T, K, D, dtype=dtype, device=device) for _ in "kv")
            if heads_first:
                caches = [
                    randn(g, B, K, S, D, dtype=dtype, device=device).transpose(1, 2) for _ in "kv"
                ]
            else:
                caches = [randn(g, B, S, K, D, dtype=dtype, device=device) for _ in "kv"]
            at = torch.tensor(lengths, dtype=torch.int64, device=device)
            return q, k, v, *tables(g, S + 3, D // 2, device=device), *caches, at, interleaved

        return make

    return [
        Case("8b decode", append([17], 1, 32, 8, 128, heads_first=True)),
        Case("ragged decode", append([1, 24, 5], 1, 8, 2, 64, heads_first=True)),
        Case("ragged decode, interleaved", append([1, 24, 5], 1, 8, 2, 64, interleaved=True)),
        Case("1b prefill", append([9, 9], 9, 32, 8, 64, heads_first=True)),
        Case("prompts padded on the left", append([5, 7, -2], 7, 4, 2, 64, heads_first=True)),
        Case("chunk", append([20, 11], 8, 6, 3, 80)),
        Case("chunk, interleaved", append([20, 11], 8, 6, 3, 80, interleaved=True)),
        Case("odd pairs", append([3, 24], 3, 3, 1, 22)),
        Case("odd pairs, interleaved", append([3, 24], 3, 3, 1, 22, interleaved=True)),
        Case("tensors of their own", append([6, 2], 4, 4, 4, 16, fused=False)),
        Case("no tokens", append([4, 0], 0, 4, 2, 64)),
        Case("no rows", append([], 3, 4, 2, 64)),
    ]


OP = Op(
    name="kv_append",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache,"
        " Tensor(b!) v_cache, Tensor lengths, bool interleaved=False) -> Tensor"
    ),
    check=check,
    autocast="widest",
    eager=eager,
    fake=fake,
    instead="rope",
    cost=cost,
    cases=cases,
)
