"""Layers by the contract of Hugging Face's kernel layers, for `kernelize` and kernel mappings.

Such a layer is a stateless nn.Module: it has a `forward` and nothing else of its own, no __init__
and no attributes, for its forward is put onto a module of the model, whose weights it reads. The
flags say that it has a backward pass and that torch.compile may trace it.

    from kernels import Mode, kernelize, use_kernel_mapping
    with use_kernel_mapping({"RMSNorm": {"cpu": Repository("RMSNorm")}}):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from .conditions import fits


class RMSNorm(nn.Module):
    """Stands for the layer "RMSNorm": a `weight` (C,) and a `variance_epsilon`."""

    weight: Tensor
    variance_epsilon: float

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., C) → (..., C), of the weight's dtype."""
        if fits(hidden_states, self.weight):
            return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        x = nn.functional.rms_norm(
            hidden_states.float(), self.weight.shape, None, self.variance_epsilon
        )
        return self.weight * x.to(hidden_states.dtype)


class SwiGLUMLP(nn.Module):
    """Stands for the layer "SwiGLUMLP": linear layers `gate_proj`, `up_proj` and `down_proj`, and
    silu between them."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = ops.swiglu(gate, up) if fits(gate, up) else nn.functional.silu(gate) * up
        return self.down_proj(h)


@dataclass(frozen=True)
class Repository:
    """Where a kernel mapping finds a layer of this file: "RMSNorm" or "SwiGLUMLP"."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return {"RMSNorm": RMSNorm, "SwiGLUMLP": SwiGLUMLP}[self.layer_name]
