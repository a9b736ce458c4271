"""Rotates the new tokens' queries and keys, and writes keys and values into the cache.

Token t of row b has the position p = lengths[b] - T + t, which is also its slot in the cache:
    q'[b,t] = rope(q[b,t], p)    k_cache[b,p] = rope(k[b,t], p)    v_cache[b,p] = v[b,t]

A batch of prompts of different lengths is padded on the left, so a position may be negative: such
a token is not stored, and its q' is 0.

A cache may be in 8 bits: each head's vector is then stored as int8 and a scale (quantized_kv.py).

Shapes    q (B,T,H,D), k and v (B,T,K,D), cos and sin (P, D/2) float32 with P the most positions,
          k_cache and v_cache (B,S,K,D), k_scale and v_scale (B,S,K) float32 of int8 caches,
          lengths (B,) int64: the valid keys of each row once the T tokens are stored
          → q' (B,T,H,D)
Layout    every tensor is contiguous in its last dim, with any stride in the others: q, k and v may
          be parts of one (B,T,(H+2K)·D) tensor, and the caches may lie as (B,K,S,D); the scales
          have any stride; q' is contiguous
Rounding  rotated in float32, rounded once, as in rope; v is copied. Then k and v to 8 bits, where
          the cache is

The caches and their scales are written; the op has no gradient. Train with rope.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from . import checks, quantized_kv
from .inputs import randn
from .model_inputs import ModelInputs
from .quantized_kv import quantize
from .rope import check_tables, rotate, tables


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Appends T tokens to the cache of each row and returns their rotated queries.

    q                 (B,T,H,D), float32, bfloat16 or float16, D even
    k, v              (B,T,K,D), of q's dtype and device
    cos, sin          (P, D/2) float32: a row for each position
    k_cache, v_cache  (B,S,K,D), of q's dtype and device; written at each token's position. Or int8,
                      with scales
    lengths           (B,) int64: valid keys of each row after the append, at most min(S, P)
    interleaved       whether the pairs are (2i, 2i + 1) rather than (i, i + D/2)
    k_scale, v_scale  (B,S,K) float32, of int8 caches; written likewise
    Returns q' (B,T,H,D), contiguous; 0 for tokens at negative positions. Raises ShapeError when the
    arguments do not fit, and before anything is written when a row would end beyond the cache or
    the tables (on a GPU such tokens are not stored and their q' is 0, since to ask would be to
    wait).
    """
    given = (q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
    if k_scale is None and v_scale is None:
        return OP(*given)
    return OP(*given, k_scale, v_scale)


def check(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale=None, v_scale=None
) -> None:
    checks.same_kind("kv_append", "q", q, k=k, v=v)
    checks.heads("kv_append", q, k=k)
    checks.shape("kv_append", "v", v, k.shape, "k's shape")
    B, _, K, D = k.shape
    checks.ndim("kv_append", "k_cache", k_cache, 4, "(B, S, K, D)")
    shape = (B, k_cache.shape[1], K, D)
    caches = ("k_cache", k_cache, k_scale, "v_cache", v_cache, v_scale)
    quantized_kv.check("kv_append", q, shape, *caches)
    checks.ndim("kv_append", "cos", cos, 2, "(P, D/2)")
    checks.shape("kv_append", "cos", cos, (cos.shape[0], q.shape[-1] // 2), "(P, D/2)")
    checks.shape("kv_append", "sin", sin, cos.shape, "cos's shape")
    check_tables("kv_append", q, cos, sin)
    checks.lengths("kv_append", lengths, q)


def too_long(row: int, length: int, S: int, P: int) -> ShapeError:
    return ShapeError(
        f"kv_append: lengths[{row}] is {length}, but the cache has S = {S} slots and the tables "
        f"P = {P} positions: make them longer, or append fewer tokens"
    )


def places(q: Tensor, lengths: Tensor, S: int, P: int) -> tuple[Tensor, Tensor, Tensor]:
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


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    b, t, p = places(q, lengths, k_cache.shape[1], cos.shape[0])
    cos, sin = cos[p, None], sin[p, None]
    new_k, new_v = rotate(k[b, t], cos, sin, interleaved), v[b, t]
    if k_scale is None:
        k_cache[b, p], v_cache[b, p] = new_k, new_v
    else:
        k_cache[b, p], k_scale[b, p] = quantize(new_k)
        v_cache[b, p], v_scale[b, p] = quantize(new_v)
    rotated = q.new_zeros(q.shape)
    rotated[b, t] = rotate(q[b, t], cos, sin, interleaved)
    return rotated


def fake(q, *others: Tensor | bool | None) -> Tensor:
    return q.new_empty(q.shape)


def cost(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale=None, v_scale=None
) -> Cost:
    """Every token once, read and written; in 8 bits each head of k and v with a scale."""
    B, T, K, D = k.shape
    read = (q.numel() + k.numel() + v.numel()) * q.element_size()
    head = D * k_cache.element_size() + (0 if k_scale is None else k_scale.element_size())
    written = q.numel() * q.element_size() + 2 * B * T * K * head
    tables = B * T * D * cos.element_size() + lengths.numel() * lengths.element_size()
    rounding = 0 if k_scale is None else 4 * (k.numel() + v.numel())
    return Cost(read + written + tables, 3 * (q.numel() + k.numel()) + rounding)


def variant(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale=None, v_scale=None
) -> str:
    return "" if k_scale is None else "int8"


def cases() -> list[Case]:
    return [*float_cases(), *int8_cases()]


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    def make(int8: bool) -> tuple:
        tables, tokens = m.rope_tables(), m.heads()
        (k_cache, k_scale), (v_cache, v_scale) = m.cache(int8), m.cache(int8)
        return *tokens, *tables, k_cache, v_cache, m.lengths(), False, k_scale, v_scale

    return {"kv_append": lambda: make(False), "kv_append int8": lambda: make(True)}


def float_cases() -> list[Case]:
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
            return (
                q,
                k,
                v,
                *tables(g, S + 3, D // 2, device=device),
                *caches,
                at,
                interleaved,
                None,
                None,
            )

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


def int8_cases() -> list[Case]:
    def in_8_bits(case: Case):
        def make(g, dtype, device):
            *tokens, k, v, lengths, interleaved, _, _ = case.make(g, dtype, device)
            (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
            return *tokens, k, v, lengths, interleaved, k_scale, v_scale

        return make

    def one_layer(g, dtype, device):
        """Values and scales laid out as in a cache, (B,K,S,D) and (B,K,S)."""
        *given, k_scale, v_scale = in_8_bits(float_cases()[1])(g, dtype, device)
        given[1][0] = 0  # a head of zeros has a scale of zero
        given[2][1] *= 1e-3

        def heads_first(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous().transpose(1, 2)

        given[5:7] = map(heads_first, given[5:7])
        return *given, heads_first(k_scale), heads_first(v_scale)

    usual = [Case(f"8 bits, {case}", in_8_bits(case), case.dtypes) for case in float_cases()]
    return [*usual, Case("8 bits, one layer", one_layer)]


OP = Op(
    name="kv_append",
    check=check,
    constants=("cos", "sin", "k_scale", "v_scale"),
    writes=("k_cache", "v_cache", "k_scale", "v_scale"),
    autocast="widest",
    eager=eager,
    fake=fake,
    grad_alternative="rope",
    cost=cost,
    cases=cases,
    variant=variant,
    at_model_size=at_model_size,
)
