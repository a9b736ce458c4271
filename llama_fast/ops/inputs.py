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
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (numbers * scale).to(device=device, dtype=dtype)
