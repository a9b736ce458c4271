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
from torch import Tensor, nn

from ..config import RopeScaling
from ..errors import ShapeError
from ..ops import documents

# Positions per step when tables are built: bounds the float64 temporaries.
_BLOCK = 4096


def _inverse_frequencies64(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Tensor:  # (D/2,) float64
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # L/λ
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    s = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wave, kept; 0: long wave, stretched
    return (1 - s) * frequency / scaling.factor + s * frequency


def inverse_frequencies(
    head_dim: int, theta: float = 500000.0, scaling: RopeScaling | None = None
) -> Tensor:
    """The scaled inverse frequencies in radians per token, (D/2,) float32."""
    return _inverse_frequencies64(head_dim, theta, scaling).float()


def rope_tables(
    head_dim: int,
    max_seq_len: int,
    theta: float = 500000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position × inverse frequency, each (max_seq_len, D/2) float32.

    Computed in float64 and rounded once, on the CPU whatever the device, so that every device
    has the same tables.
    """
    frequency = _inverse_frequencies64(head_dim, theta, scaling)
    cos = torch.empty(max_seq_len, frequency.numel(), dtype=torch.float32, device="cpu")
    sin = torch.empty_like(cos)
    for start in range(0, max_seq_len, _BLOCK):
        stop = min(start + _BLOCK, max_seq_len)
        angle = torch.arange(start, stop, dtype=torch.float64, device="cpu")[:, None] * frequency
        cos[start:stop] = angle.cos()
        sin[start:stop] = angle.sin()
    return cos.to(device), sin.to(device)


class RotaryEmbedding(nn.Module):
    """The tables cos and sin, each (max_seq_len, D/2) float32 whatever the model's dtype."""

    def __init__(
        self,
        head_dim: int,  # D
        max_seq_len: int,
        theta: float = 500000.0,
        scaling: RopeScaling | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        shape = (max_seq_len, head_dim // 2)
        for name in ("cos", "sin"):
            table = torch.empty(shape, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset()

    def reset(self) -> None:
        if not self.cos.is_meta:
            self.cos, self.sin = rope_tables(
                self.head_dim, len(self.cos), self.theta, self.scaling, self.cos.device
            )

    def _apply(self, fn, recurse: bool = True):
        """A cast of the whole model must not round the tables, and memory given to a model that
        had none (`to_empty`) must be filled: then the tables are made anew."""
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if was_meta or self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
            self.reset()
        return self

    def forward(self, T: int, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the rows of positions 0 … T-1, each (T, D/2); with cu_seqlens (n+1,) int32, those
        of the position of each of T tokens in its own document. Raises ShapeError for a document
        that is longer than the tables. On a GPU and in a trace, where its length is not read,
        indexing stops the program instead."""
        if cu_seqlens is None:
            return self.cos[:T], self.sin[:T]
        if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
            spans = documents.spans("the model", cu_seqlens, T)
            for i, (begin, end) in enumerate(spans):
                if end - begin > len(self.cos):
                    raise ShapeError(
                        f"document {i} of cu_seqlens has {end - begin} tokens; this model's "
                        f"context is {len(self.cos)}: cut the document, or leave it out"
                    )
        position = documents.positions(cu_seqlens, T)
        return self.cos[position], self.sin[position]
