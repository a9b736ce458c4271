"""SwiGLU's elementwise part: h = silu(gate) · up, with silu(z) = z · σ(z) = z / (1 + e^-z).

Shazeer, "GLU Variants Improve Transformer" (2020); the linears on either side are not part of it.

Shapes    gate (..., F), up (..., F) → h (..., F)
Layout    gate and up are contiguous in F, their other dims have any stride: they may be the two
          halves of one (..., 2F) tensor; h is contiguous
Rounding  silu in float32, cast to gate's dtype, then multiply by up

Gradient, with s = σ(gate) and g the gradient of h:
    d_gate = g · up · s · (1 + gate · (1 - s))        d_up = g · silu(gate)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..dispatch import Case, Cost, Op, Sharding
from . import checks
from .inputs import randn
from .model_inputs import ModelInputs
from .rms_norm import accumulate


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    gate  (..., F), float32, bfloat16 or float16, contiguous in F
    up    (..., F), of gate's shape, dtype and device
    Returns h (..., F), contiguous, of gate's dtype. Raises ShapeError when the arguments do not
    fit.
    """
    return OP(gate, up)


def check(gate: torch.Tensor, up: torch.Tensor) -> None:
    checks.same_kind("swiglu", "gate", gate, up=up)
    checks.rows("swiglu", "gate", gate, "(..., F)")
    checks.shape("swiglu", "up", up, gate.shape, "gate's shape")


def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate) * up).contiguous()


def backward_eager(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulate(gate.dtype)
    g, z, u = grad.to(dtype), gate.to(dtype), up.to(dtype)
    s = torch.sigmoid(z)
    d_gate, d_up = g * u * s * (1 + z * (1 - s)), g * z * s
    return d_gate.to(gate.dtype).contiguous(), d_up.to(up.dtype).contiguous()


def backward_check(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    check(gate, up)
    checks.same_kind("swiglu_backward", "gate", gate, grad=grad)
    checks.shape("swiglu_backward", "grad", grad, gate.shape, "gate's shape")


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    return inputs, None


def gradient(saved: tuple, rest: None, needed: tuple, grad: torch.Tensor) -> tuple:
    return BACKWARD(grad, *saved)


def cost(gate: torch.Tensor, up: torch.Tensor) -> Cost:
    return Cost(bytes=3 * gate.numel() * gate.element_size(), flops=5 * gate.numel())


def backward_cost(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Cost:
    return Cost(bytes=5 * gate.numel() * gate.element_size(), flops=11 * gate.numel())


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    return {"swiglu": lambda: m.rows(2 * m.config.hidden_dim).chunk(2, dim=-1)}


def cases() -> list[Case]:
    def pair(*shape: int, scale: float = 1.0):
        return lambda g, dtype, device: (
            randn(g, *shape, dtype=dtype, device=device, scale=scale),
            randn(g, *shape, dtype=dtype, device=device),
        )

    def halves(*shape: int):
        return lambda g, dtype, device: randn(g, *shape, dtype=dtype, device=device).chunk(2, -1)

    def transposed(g, dtype, device):
        gate, up = pair(3, 5, 4, 24)(g, dtype, device)
        return gate.transpose(0, 2), up.transpose(0, 2)

    return [
        Case("one row", pair(512)),
        Case("one element", pair(3, 1)),
        Case("odd", pair(5, 123, 13)),
        Case("no rows", pair(0, 64)),
        Case("8b decode", halves(1, 1, 2 * 14336)),
        Case("1b prefill", halves(2, 3, 2 * 8192)),
        Case("odd halves", halves(7, 2 * 83)),
        Case("transposed", transposed),
        Case("saturated", pair(6, 333, scale=40.0)),
        Case("tiny", pair(6, 70, scale=1e-3)),
    ]


OP = Op(
    name="swiglu",
    check=check,
    autocast="widest",
    eager=eager,
    save=save,
    gradient=gradient,
    made_again=True,
    sharding=Sharding("...F, ...F -> ...F", "... F"),
    cost=cost,
    cases=cases,
    at_model_size=at_model_size,
)
BACKWARD = Op(
    name="swiglu_backward",
    check=backward_check,
    eager=backward_eager,
    sharding=Sharding("...F, ...F, ...F -> ...F, ...F", "... F"),
    cost=backward_cost,
)
