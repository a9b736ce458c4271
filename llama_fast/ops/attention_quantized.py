"""Attention against keys and values in 8 bits: o = softmax(scale · q·kᵀ) v, causal or not.

    k[b,s,h,d] = k_scales[b,s,h] · k_codes[b,s,h,d]      v likewise, see quantized_kv.py

Shapes    q (B, T, H, D); k_codes and v_codes (B, S, K, D) int8, k_scales and v_scales (B, S, K)
          float32; lengths (B,) int64 → o (B, T, H, D)
Layout    q and the codes are contiguous in D, all other dims have any stride (as have those of the
          scales); o is contiguous
Keys      as in attention: row b has the keys s < lengths[b], and its T queries are the last T of
          them. What lies behind lengths[b] is never used
Rounding  k and v to q's dtype, then as in attention

There is no gradient: a cache is read where none is recorded.
"""

from __future__ import annotations

import torch

from ..dispatch import Case, Cost, Op
from . import checks, quantized_kv
from .attention import cases as attention_cases
from .attention import check_groups, dense, keys_and_pairs
from .attention import eager as attention_eager
from .inputs import randn
from .quantized_kv import QuantizedKV, dequantize, quantize


def attention_quantized(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped-query heads against a cache in 8 bits.

    `llama_fast.attention(q, k, v)` calls this where k and v are each a QuantizedKV.

    q                   (B, T, H, D), float32, bfloat16 or float16, contiguous in D
    k_codes, v_codes    (B, S, K, D) int8, contiguous in D; H is a multiple of K
    k_scales, v_scales  (B, S, K) float32
    causal, scale, lengths   as in attention
    Returns o (B, T, H, D), contiguous, of q's dtype. Raises ShapeError when the arguments do not
    fit.
    """
    return OP(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths)


def check(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths) -> None:
    name = "attention_quantized"
    checks.same_kind(name, "q", q)
    checks.ndim(name, "q", q, 4, "(B, T, H, D)")
    checks.ndim(name, "k's codes", k_codes, 4, "(B, S, K, D)")
    B, _, H, D = q.shape
    _, S, K, _ = k_codes.shape
    quantized_kv.check(name, "k", QuantizedKV(k_codes, k_scales), q, (B, S, K, D))
    quantized_kv.check(name, "v", QuantizedKV(v_codes, v_scales), q, (B, S, K, D))
    check_groups(name, H, K, D)
    if lengths is not None:
        checks.lengths(name, lengths, q)


def eager(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths) -> torch.Tensor:
    k = dequantize(QuantizedKV(k_codes, k_scales), q.dtype)
    v = dequantize(QuantizedKV(v_codes, v_scales), q.dtype)
    return attention_eager(q, k, v, causal, scale, lengths)[0]


def fake(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths) -> torch.Tensor:
    return q.new_empty(q.shape)


def cost(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths) -> Cost:
    """As attention's, with a byte for each element of the valid keys and values, and 4 for each of
    their scales."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k_codes, causal, lengths)
    held = 2 * keys * k_codes.shape[2] * (D + k_scales.element_size())
    return Cost(bytes=2 * q.numel() * q.element_size() + held, flops=4 * D * H * pairs)


def cases() -> list[Case]:
    def quantized(make):
        """A case of attention, with its keys and values rounded and laid out as they were."""

        def rounded(x: torch.Tensor) -> QuantizedKV:
            codes, scales = quantize(x)
            like = torch.empty_strided(x.shape, x.stride(), dtype=torch.int8, device=x.device)
            return QuantizedKV(like.copy_(codes), scales)

        def make_quantized(g, dtype, device):
            q, k, v, causal, scale, lengths, _ = make(g, dtype, device)
            return q, *rounded(k), *rounded(v), causal, scale, lengths

        return make_quantized

    def cache(g, dtype, device):
        """One layer of a cache: scales (B, K, S) too, more slots than are given, zeros among them,
        and heads of very different sizes."""
        k, v = (randn(g, 3, 2, 700, 64, dtype=torch.float32) for _ in range(2))
        k[:, 1] *= 1e-3
        v[:, 0] *= 50
        v[0, 1, 5] = 0
        k[2, 0, 40:43] = 0
        parts = []
        for x in (k, v):
            parts += (part.to(device)[:, :, :600].transpose(1, 2) for part in quantize(x))
        lengths = torch.tensor([600, 1, 77], device=device)
        return randn(g, 3, 1, 8, 64, dtype=dtype, device=device), *parts, True, None, lengths

    def outliers(g, dtype, device):
        """Channels of the keys that are far larger than the others, as published models have."""
        q = randn(g, 1, 1, 4, 128, dtype=dtype, device=device)
        k, v = (randn(g, 1, 90, 1, 128, dtype=torch.float32) for _ in range(2))
        k[..., 7] *= 20
        k = quantize(k)
        return q, *(x.to(device) for x in (*k, *quantize(v))), True, 0.02, None

    few = [
        Case("wide, a tail of 8", quantized(dense(2, 1, 131, 6, 2, 72, lengths=[131, 9]))),
        Case("a group of 5", quantized(dense(1, 1, 70, 5, 1, 128))),
        Case("three parts", quantized(dense(1, 1, 2100, 8, 2, 64))),
        Case("two queries a part apart", quantized(dense(1, 2, 1026, 4, 2, 64))),
        Case("few and many", quantized(dense(3, 21, 60, 4, 1, 64, lengths=[60, 3, -1]))),
    ]
    usual = [
        Case(str(case), quantized(case.make), case.dtypes)
        for case in attention_cases()
        if "gradient" not in str(case)
    ]
    return [*usual, *few, Case("one layer", cache), Case("outliers", outliers)]


OP = Op(
    name="attention_quantized",
    schema="(Tensor q, Tensor k_codes, Tensor k_scales, Tensor v_codes, Tensor v_scales, "
    "bool causal=True, float? scale=None, Tensor? lengths=None) -> Tensor",
    check=check,
    constants=("k_scales", "v_scales"),
    autocast="lower",
    eager=eager,
    fake=fake,
    cost=cost,
    cases=cases,
)
