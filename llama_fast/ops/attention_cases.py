"""The cases of `attention`: of floats, of keys and values in 8 bits, and of packed documents."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..dispatch import Case
from .inputs import randn
from .quantized_kv import quantize


def dense(B, T, S, H, K, D, causal=True, scale=None, lengths=None, spread=1.0, need_lse=False):
    """What makes the arguments of a case from contiguous normal numbers."""

    def make(g, dtype, device):
        at = {"dtype": dtype, "device": device}
        return (
            randn(g, B, T, H, D, scale=spread, **at),
            randn(g, B, S, K, D, **at),
            randn(g, B, S, K, D, **at),
            causal,
            scale,
            None if lengths is None else torch.tensor(lengths, device=device),
            need_lse,
            None,
            None,
            None,
        )

    return make


def cases() -> list[Case]:
    return [*float_cases(), *int8_cases(), *packed_cases()]


def float_cases() -> list[Case]:
    def heads_first(g, dtype, device):
        """transformers' (B, H, T, D) tensors, transposed to this op's order."""
        at = {"dtype": dtype, "device": device}
        q, k, v = (randn(g, 2, heads, 19, 64, **at).transpose(1, 2) for heads in (6, 2, 2))
        return q, k, v, True, None, None, False, None, None, None

    def cache(g, dtype, device):
        """A cache (B, K, S, D) with room to spare, of which each row holds its own length."""
        at = {"dtype": dtype, "device": device}
        k, v = (randn(g, 3, 2, 150, 64, **at).transpose(1, 2) for _ in range(2))
        lengths = torch.tensor([150, 1, 77], device=device)
        return randn(g, 3, 1, 8, 64, **at), k, v, True, None, lengths, False, None, None, None

    def fused(g, dtype, device):
        """Slices of one projection (B, T, (H + 2K)·D)."""
        qkv = randn(g, 1, 21, 8, 72, dtype=dtype, device=device)
        return (
            qkv[:, :, :4],
            qkv[:, :, 4:6],
            qkv[:, :, 6:],
            True,
            None,
            None,
            False,
            None,
            None,
            None,
        )

    return [
        Case("one key", dense(1, 1, 1, 2, 1, 8)),
        Case("prefill", dense(2, 17, 17, 4, 2, 64)),
        Case("1b heads", dense(1, 40, 40, 32, 8, 64)),
        Case("8b decode", dense(1, 1, 130, 32, 8, 128)),
        Case("chunk against a cache", dense(2, 9, 50, 6, 2, 128, lengths=[50, 31])),
        Case("long", dense(1, 1023, 1023, 1, 1, 16), dtypes=(torch.float32, torch.bfloat16)),
        Case("long decode", dense(1, 1, 2085, 4, 1, 32)),
        Case("few queries, long", dense(2, 3, 1100, 4, 2, 24, lengths=[1100, 555])),
        Case("group of 3", dense(1, 70, 70, 6, 2, 40)),
        Case("group of 7", dense(2, 1, 65, 7, 1, 96, lengths=[65, 64])),
        Case("group of 16", dense(1, 2, 35, 16, 1, 256)),
        Case("group of 8, wide heads", dense(1, 12, 20, 8, 1, 256)),
        Case("more queries than keys", dense(1, 23, 9, 2, 2, 64)),
        Case("no keys", dense(2, 3, 0, 2, 1, 64)),
        Case("no queries", dense(2, 0, 5, 2, 1, 64)),
        Case("ragged", dense(5, 20, 33, 4, 2, 64, lengths=[33, 20, 7, 0, -4])),
        Case("ragged decode", dense(4, 1, 33, 8, 2, 128, lengths=[33, 0, 1, 17])),
        Case("not causal", dense(2, 19, 45, 4, 1, 72, causal=False, lengths=[45, 13])),
        Case("not causal, one query", dense(2, 1, 90, 4, 2, 64, causal=False, scale=0.3)),
        Case("sharp", dense(1, 33, 33, 4, 2, 64, spread=8.0)),
        Case("for a gradient", dense(2, 37, 37, 6, 2, 64, need_lse=True)),
        Case(
            "for a gradient, ragged",
            dense(3, 9, 70, 4, 2, 40, lengths=[70, 3, 0], need_lse=True),
        ),
        Case("for a gradient, one query", dense(2, 1, 600, 4, 1, 64, need_lse=True)),
        Case("heads first", heads_first),
        Case("cache", cache),
        Case("slices of a fused projection", fused),
    ]


def int8_cases() -> list[Case]:
    def quantized(make):
        """A case of attention, with its keys and values rounded and laid out as they were."""

        def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
            values, scale = quantize(x)
            like = torch.empty_strided(x.shape, x.stride(), dtype=torch.int8, device=x.device)
            return like.copy_(values), scale

        def make_quantized(g, dtype, device):
            q, k, v, causal, scale, lengths, *_ = make(g, dtype, device)
            (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
            return q, k, v, causal, scale, lengths, False, k_scale, v_scale, None

        return make_quantized

    def cache(g, dtype, device):
        """One layer of a cache: scales (B, K, S) too, more slots than are given, zeros among them,
        and heads of very different sizes."""
        k, v = (randn(g, 3, 2, 700, 64, dtype=torch.float32) for _ in range(2))
        k[:, 1] *= 1e-3
        v[:, 0] *= 50
        v[0, 1, 5] = 0
        k[2, 0, 40:43] = 0
        parts = (
            part.to(device)[:, :, :600].transpose(1, 2) for x in (k, v) for part in quantize(x)
        )
        k, k_scale, v, v_scale = parts
        lengths = torch.tensor([600, 1, 77], device=device)
        q = randn(g, 3, 1, 8, 64, dtype=dtype, device=device)
        return q, k, v, True, None, lengths, False, k_scale, v_scale, None

    def outliers(g, dtype, device):
        """Channels of the keys that are far larger than the others, as published models have."""
        q = randn(g, 1, 1, 4, 128, dtype=dtype, device=device)
        k, v = (randn(g, 1, 90, 1, 128, dtype=torch.float32) for _ in range(2))
        k[..., 7] *= 20
        k, k_scale, v, v_scale = (x.to(device) for x in (*quantize(k), *quantize(v)))
        return q, k, v, True, 0.02, None, False, k_scale, v_scale, None

    few = {
        "wide, a tail of 8": quantized(dense(2, 1, 131, 6, 2, 72, lengths=[131, 9])),
        "a group of 5": quantized(dense(1, 1, 70, 5, 1, 128)),
        "three splits": quantized(dense(1, 1, 2100, 8, 2, 64)),
        "two queries a split apart": quantized(dense(1, 2, 1026, 4, 2, 64)),
        "decode and prefill": quantized(dense(3, 21, 60, 4, 1, 64, lengths=[60, 3, -1])),
        "one layer": cache,
        "outliers": outliers,
    }
    usual = [case for case in float_cases() if "gradient" not in str(case)]
    return [
        *(Case(f"8 bits, {c}", quantized(c.make), c.dtypes) for c in usual),
        *(Case(f"8 bits, {name}", make) for name, make in few.items()),
    ]


def packed_cases() -> list[Case]:
    def ends(lengths, device):
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def packed(lengths, H, K, D, causal=True, scale=None, spread=1.0, need_lse=False):
        """Documents of these lengths."""

        def make(g, dtype, device):
            T = sum(lengths)
            args = dense(1, T, T, H, K, D, causal, scale, None, spread, need_lse)(g, dtype, device)
            return *args[:-1], ends(lengths, device)

        return make

    def fused(g, dtype, device):
        """Slices of one projection (B, T, (H + 2K)·D)."""
        qkv = randn(g, 1, 29, 8, 72, dtype=dtype, device=device)
        documents = ends([11, 18], device)
        q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
        return q, k, v, True, None, None, False, None, None, documents

    def heads_first(g, dtype, device):
        """transformers' (B, H, T, D) tensors, transposed."""
        at = {"dtype": dtype, "device": device}
        q, k, v = (randn(g, 1, heads, 26, 40, **at).transpose(1, 2) for heads in (6, 2, 2))
        return q, k, v, False, None, None, False, None, None, ends([5, 20, 1], device)

    def strided_ends(g, dtype, device):
        *args, documents = packed([3, 4], 2, 1, 16)(g, dtype, device)
        return *args, documents.repeat_interleave(2)[::2]

    return [
        Case("packed", packed([5, 1, 8], 2, 1, 8)),
        Case("packed, odd lengths", packed([7, 1, 0, 23, 0, 37], 6, 2, 64)),
        Case("packed, for a gradient", packed([19, 0, 3, 31], 4, 2, 40, need_lse=True)),
        Case("packed, one document", packed([41], 4, 1, 64)),
        Case("packed, many tiny", packed([1, 2, 3, 1, 1, 4] * 2, 4, 2, 24)),
        Case("packed, empty at the ends", packed([0, 0, 6, 9, 0], 2, 2, 32)),
        Case("packed, no tokens", packed([0, 0], 2, 1, 64)),
        Case("packed, tiles", packed([66, 129, 70], 2, 1, 128, spread=3.0)),
        Case("packed, not causal", packed([17, 5, 1, 33], 4, 2, 72, causal=False, scale=0.2)),
        Case("packed, a group of 16", packed([2, 9, 21], 16, 1, 256)),
        Case("packed, slices of a fused projection", fused),
        Case("packed, heads first", heads_first),
        Case("packed, every second number", strided_ends),
    ]
