"""Rotary position embedding: the frequencies, their scaling since Llama 3.1, and the tables.

Legend of dims: D head dim.

    f_i = theta^(-2i/D)                      i = 0 … D/2-1
    λ_i = 2π / f_i                           wavelength in tokens, L the original context
    λ_i < L/high            f_i              short waves are kept
    λ_i > L/low             f_i / factor     long waves are stretched
    between                 (1-s)·f_i/factor + s·f_i,   s = (L/λ_i - low) / (high - low)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_fast.config import LlamaConfig

# Positions per step when tables are built: bounds the float64 temporaries.
_BLOCK = 4096


def _inverse_frequencies64(config: LlamaConfig) -> Tensor:  # (D/2,) float64
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # L/λ
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    s = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wave, kept; 0: long wave, stretched
    return (1 - s) * frequency / scaling.factor + s * frequency


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """The scaled inverse frequencies in radians per token, (D/2,) float32."""
    return _inverse_frequencies64(config).float()


def rope_tables(
    config: LlamaConfig, max_seq_len: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position × inverse frequency, each (max_seq_len, D/2) float32.

    Computed in float64 and rounded once, on the CPU whatever the device, so that every device
    has the same tables.
    """
    frequency = _inverse_frequencies64(config)
    cos = torch.empty(max_seq_len, frequency.numel(), dtype=torch.float32)
    sin = torch.empty_like(cos)
    for start in range(0, max_seq_len, _BLOCK):
        stop = min(start + _BLOCK, max_seq_len)
        angle = torch.arange(start, stop, dtype=torch.float64)[:, None] * frequency
        cos[start:stop] = angle.cos()
        sin[start:stop] = angle.sin()
    return cos.to(device), sin.to(device)
