"""Attention against keys and values in 8 bits: o = softmax(scale · q kᵀ) v.

    k[s,d] = a[s] · k_codes[s,d]        v[s,d] = b[s] · v_codes[s,d]

A scale for each position and KV head leaves both sums,

    q kᵀ = a · (q k_codesᵀ)             p v = (p · b) v_codes

so a tile of codes is read once, as bytes, and multiplied as it is. The kernels are those of
attention.py: few queries split the keys, many of them share tiles, and no memory is taken for keys
and values in q's dtype. What differs is how large a tile is best.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .attention import FEW_ROWS, AttentionConfig, attend
from .attention import forward_config as of_floats
from .chips import Chip


def forward_config(chip: Chip, rows: int, D: int, dtype: torch.dtype) -> AttentionConfig:
    """As attention's for few rows and in float32. Codes become q's dtype in registers, so the other
    tiles are smaller, or shared by more warps; float16 keeps a unit besides."""
    config = of_floats(chip, rows, D, dtype)
    if dtype == torch.float32 or rows <= FEW_ROWS:
        return config
    if D > 128:
        return replace(config, block_m=64, block_n=16)
    if chip.hopper:
        return replace(config, block_n=32) if rows <= 64 < D else config
    crowded = not chip.amd and (D > 64 or dtype == torch.float16)
    return replace(config, block_n=32, num_warps=8 if crowded else config.num_warps)


def attention_quantized(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """As llama_fast.ops.attention_quantized."""
    codes, scales = (k_codes, v_codes), (k_scales, v_scales)
    given = (causal, scale, lengths, False)
    return attend("attention_quantized", forward_config, q, codes, scales, *given)[0]
