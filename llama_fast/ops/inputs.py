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
    """Normal numbers of `shape`, drawn on the CPU, so that every device gets the same."""
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float32)
    return (numbers * scale).to(device=device, dtype=dtype)
