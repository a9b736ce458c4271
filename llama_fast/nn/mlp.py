"""The SwiGLU feed-forward block. Legend of dims: C model dim, F hidden dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import GateUp, Linear


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) · up(x)), gate and up in one projection."""

    def __init__(
        self,
        dim: int,  # C
        hidden_dim: int,  # F
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = GateUp(dim, 2 * hidden_dim, device, dtype)
        self.down = Linear(hidden_dim, dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))
