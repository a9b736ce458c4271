"""Rotates the new tokens' queries and keys, and writes keys and values into a cache in 8 bits.

    q'[b,t] = rope(q[b,t], p)    k_cache[b,p] ≈ rope(k[b,t], p)    v_cache[b,p] ≈ v[b,t]

with p = lengths[b] - T + t as in kv_append, and each head's vector held as codes and a scale as
quantized_kv.py says.

Shapes    those of kv_append, with the caches k_codes and v_codes (B,S,K,D) int8, k_scales and
          v_scales (B,S,K) float32 → q' (B,T,H,D)
Layout    as in kv_append; the scales have any stride
Rounding  q' and the rotated keys as in rope, to their dtype; then keys and values to 8 bits

Codes and scales are written; the op has no gradient.
"""

from __future__ import annotations

import torch

from ..dispatch import Case, Cost, Op
from . import checks, quantized_kv
from .kv_append import cases as kv_append_cases
from .kv_append import check_tokens, places
from .quantized_kv import QuantizedKV, quantize
from .rope import rotate


def kv_append_quantized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    lengths: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Appends T tokens to the cache of each row and returns their rotated queries.

    `llama_fast.kv_append` calls this where its caches are each a QuantizedKV.

    k_codes, v_codes    (B,S,K,D) int8, contiguous in D; written at each token's position
    k_scales, v_scales  (B,S,K) float32; written likewise
    The other arguments, the result and what is raised are those of kv_append.
    """
    return OP(q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved)


def check(q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved) -> None:
    name = "kv_append_quantized"
    checks.ndim(name, "k_cache's codes", k_codes, 4, "(B, S, K, D)")
    check_tokens(name, q, k, v, cos, sin, lengths)
    B, _, K, D = k.shape
    shape = (B, k_codes.shape[1], K, D)
    quantized_kv.check(name, "k_cache", QuantizedKV(k_codes, k_scales), q, shape)
    quantized_kv.check(name, "v_cache", QuantizedKV(v_codes, v_scales), q, shape)


def eager(
    q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved
) -> torch.Tensor:
    b, t, p = places(q, lengths, k_codes.shape[1], cos.shape[0])
    cos, sin = cos[p, None], sin[p, None]
    k_codes[b, p], k_scales[b, p] = quantize(rotate(k[b, t], cos, sin, interleaved))
    v_codes[b, p], v_scales[b, p] = quantize(v[b, t])
    rotated = q.new_zeros(q.shape)
    rotated[b, t] = rotate(q[b, t], cos, sin, interleaved)
    return rotated


def fake(
    q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved
) -> torch.Tensor:
    return q.new_empty(q.shape)


def cost(q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved) -> Cost:
    """As kv_append's, with a byte written for each element of k and v, and a scale for each of
    their heads."""
    B, T, K, D = k.shape
    read = (q.numel() + k.numel() + v.numel()) * q.element_size()
    written = q.numel() * q.element_size() + 2 * B * T * K * (D + k_scales.element_size())
    tables = B * T * D * cos.element_size() + lengths.numel() * lengths.element_size()
    return Cost(
        bytes=read + written + tables,
        flops=3 * (q.numel() + k.numel()) + 4 * (k.numel() + v.numel()),
    )


def cases() -> list[Case]:
    def quantized(make):
        def make_quantized(g, dtype, device):
            *tokens, k_cache, v_cache, lengths, interleaved = make(g, dtype, device)
            caches = (part for cache in (k_cache, v_cache) for part in quantize(cache))
            return *tokens, *caches, lengths, interleaved

        return make_quantized

    def one_layer(g, dtype, device):
        """Codes and scales laid out as in a cache, (B,K,S,D) and (B,K,S)."""
        *tokens, k_cache, v_cache, lengths, interleaved = kv_append_cases()[1].make(
            g, dtype, device
        )
        caches = [
            part.transpose(1, 2).contiguous().transpose(1, 2)
            for cache in (k_cache, v_cache)
            for part in quantize(cache)
        ]
        tokens[1][0] = 0  # a head of zeros has a scale of zero
        tokens[2][1] *= 1e-3
        return *tokens, *caches, lengths, interleaved

    usual = [Case(str(case), quantized(case.make), case.dtypes) for case in kv_append_cases()]
    return [*usual, Case("one layer", one_layer)]


OP = Op(
    name="kv_append_quantized",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes,"
        " Tensor(b!) k_scales, Tensor(c!) v_codes, Tensor(d!) v_scales, Tensor lengths,"
        " bool interleaved=False) -> Tensor"
    ),
    check=check,
    constants=("cos", "sin", "k_scales", "v_scales"),
    autocast="widest",
    eager=eager,
    fake=fake,
    instead="rope",
    cost=cost,
    cases=cases,
)
