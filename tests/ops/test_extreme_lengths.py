"""Lengths far below zero, as a NaN cast to int64 gives: no token is stored, and none sees a key."""

from __future__ import annotations

import pytest
import torch

from llama_fast import attention, kv_append
from llama_fast.ops.quantized_kv import quantize
from llama_fast.ops.rope import tables

from .backends import BACKENDS, device, name_of, on
from .oracle import fence, same_bits

LEAST = torch.iinfo(torch.int64).min
T, S, H, K, D = 3, 8, 4, 2, 64
LENGTHS = [LEAST, LEAST + 1, LEAST + T, -(2**40) + 5, -(2**32) + 5, -T - 1, -T, 0]
B = len(LENGTHS)


def heads(n: int, tokens: int = T) -> torch.Tensor:
    return torch.randn(B, tokens, n, D, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_kv_append_stores_nothing(backend, quantized):
    where = device(name_of(backend))
    q, k = heads(H).to(where), heads(K).to(where)
    cos, sin = tables(torch.Generator().manual_seed(0), S, D // 2, device=where)
    caches, buffers = [], []
    for cache in (heads(K, S), heads(K, S)):
        fenced = [fence(part.to(where)) for part in (quantize(cache) if quantized else (cache,))]
        caches.append([part for part, _ in fenced])
        buffers += [buffer for _, buffer in fenced]
    before = [buffer.clone() for buffer in buffers]
    (k_cache, *k_scale), (v_cache, *v_scale) = caches
    scales = {"k_scale": k_scale[0], "v_scale": v_scale[0]} if quantized else {}
    lengths = torch.tensor(LENGTHS, device=where)
    with on(name_of(backend)):
        rotated = kv_append(q, k, k, cos, sin, k_cache, v_cache, lengths, **scales)
    assert not rotated.any()
    assert all(same_bits(a, b) for a, b in zip(buffers, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, T, 40])
def test_attention_sees_nothing(backend, causal, tokens):
    where = device(name_of(backend))
    # CUDA has kernels of half types.
    dtype = torch.bfloat16 if "cuda" in name_of(backend) else torch.float32
    q, k = heads(H, tokens).to(where, dtype), heads(K, S).to(where, dtype)
    with on(name_of(backend)):
        o = attention(q, k, k, causal=causal, lengths=torch.tensor(LENGTHS, device=where))
    assert not o.any()
