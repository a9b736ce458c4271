"""Random inputs for the ops' cases: seeded, never zero, of any layout."""

from __future__ import annotations

import torch

HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def randn(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal numbers of `shape`, the same on every device and CPU: drawn on the CPU in float64, as
    torch draws float32 with the vector unit's own logarithm."""
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (numbers * scale).to(device=device, dtype=dtype)


def rand(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Float32 numbers of `shape` from 0 to below 1, on the CPU."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def randint(
    generator: torch.Generator, below: int, *shape: int, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Whole numbers of `shape` from 0 to below `below`, on the CPU."""
    return torch.randint(below, shape, generator=generator, dtype=dtype, device="cpu")
