"""Problem shapes that kernels are compiled for ahead of time, as tensors of the meta device.

`aot_calls(models, brief)` of a kernel's file yields (launcher, arguments) that cover the
configurations which ship: of each of the `models`, training and decoding, and, unless it is to be
`brief`, of what they do not have, such as other head dims and dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

HALF, FULL = torch.bfloat16, torch.float32
B, T = 2, 2048


class Dims(NamedTuple):
    """Of a model (docs/shapes.md)."""

    H: int
    K: int
    D: int
    C: int
    F: int


# The published models whose dims differ, by preset.
MODELS = {
    "1b": Dims(32, 8, 64, 2048, 8192),
    "8b": Dims(32, 8, 128, 4096, 14336),
    "405b": Dims(128, 8, 128, 16384, 53248),
}
# C of float32 rows, and that of rows which fit into no processor's registers.
WIDTHS, WIDE = (2048, 4096, 16384), 65536


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(dims: Dims) -> tuple[torch.Tensor, ...]:
    """q, k and v: parts of one product."""
    H, K, D = dims[:3]
    return empty(B, T, H + 2 * K, D).split((H, K, K), dim=2)


def cache(dims: Dims) -> list[torch.Tensor]:
    """Keys and values, as a model's cache lays them out."""
    return [empty(B, dims.K, T, dims.D).transpose(1, 2) for _ in "kv"]


def quantized(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit values and scales in the place of keys or values (B, S, K, D), laid out as they are."""
    heads = cache.transpose(1, 2)
    scales = torch.empty(heads.shape[:3], dtype=FULL, device="meta")
    return torch.empty_like(heads, dtype=torch.int8).transpose(1, 2), scales.transpose(1, 2)
