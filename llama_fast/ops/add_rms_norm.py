"""Residual addition and RMSNorm in one: residual' = x + residual; y = rms_norm(residual').

A Llama block ends with an addition to the residual stream and the next one begins with a norm of
it; done together, the stream is read once and written once.

Shapes    x (..., C), residual (..., C), weight (C,) → y (..., C), residual' (..., C)
Layout    x and residual are contiguous in C, their other dims have any stride; the outputs are
          contiguous, in memory of their own
Rounding  the sum is rounded to the dtype, as the model's own addition is; then as in rms_norm

Gradient, with (dx, dw) the gradients of rms_norm at residual' and g' that of residual':
    d_x = d_residual = dx + g'        d_weight = dw
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dispatch import Case, Cost, Op, Sharding
from . import checks, rms_norm
from .inputs import randn
from .model_inputs import ModelInputs


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds `x` to the residual stream and normalises the sum.

    x         (..., C), float32, bfloat16 or float16, contiguous in C
    residual  (..., C), of x's shape, dtype and device
    weight    (C,), of x's dtype and device
    eps       added to the mean of squares
    Returns (y, residual + x), both (..., C), contiguous, of x's dtype; writes neither input.
    Raises ShapeError when the arguments do not fit.
    """
    return OP(x, residual, weight, eps)


def check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    checks.same_kind("add_rms_norm", "x", x, residual=residual, weight=weight)
    checks.rows("add_rms_norm", "x", x, "(..., C)")
    checks.shape("add_rms_norm", "residual", residual, x.shape, "x's shape")
    checks.shape("add_rms_norm", "weight", weight, x.shape[-1:], "(C,)")


def eager(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    return rms_norm.eager(total, weight, eps), total


def backward_eager(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw = rms_norm.backward_unrounded(grad_y, total, weight, eps)
    return (dx + grad_total).to(total.dtype).contiguous(), dw.to(weight.dtype)


def backward_check(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> None:
    op = "add_rms_norm_backward"
    checks.same_kind(op, "total", total, weight=weight, grad_y=grad_y, grad_total=grad_total)
    checks.rows(op, "total", total, "(..., C)")
    checks.shape(op, "weight", weight, total.shape[-1:], "(C,)")
    checks.shape(op, "grad_y", grad_y, total.shape, "the shape of total")
    checks.shape(op, "grad_total", grad_total, total.shape, "the shape of total")


def save(inputs: tuple, output: tuple) -> tuple:
    _, _, weight, eps = inputs
    return (output[1], weight), eps


def gradient(
    saved: tuple, eps: float, needed: tuple, grad_y: torch.Tensor, grad_total: torch.Tensor
) -> tuple:
    dx, dw = BACKWARD(grad_y, grad_total, *saved, eps)
    return dx, dx, dw, None


def cost(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(bytes=(4 * x.numel() + weight.numel()) * x.element_size(), flops=5 * x.numel())


def backward_cost(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Cost:
    elements = 4 * total.numel() + 2 * weight.numel()
    return Cost(bytes=elements * total.element_size(), flops=12 * total.numel())


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    C = m.config.dim
    return {"add_rms_norm": lambda: (m.rows(C), m.rows(C), m.randn(C), m.config.norm_eps)}


def cases() -> list[Case]:
    def of_rms_norm(case: Case):
        def make(g, dtype, device):
            x, weight, eps = case.make(g, dtype, device)
            return x, randn(g, *x.shape, dtype=dtype, device=device), weight, eps

        return make

    def strided_residual(g, dtype, device):
        x = randn(g, 2, 5, 70, dtype=dtype, device=device)
        residual = randn(g, 2, 10, 97, dtype=dtype, device=device)[:, ::2, 13:83]
        return x, residual, randn(g, 70, dtype=dtype, device=device), 1e-5

    return [
        *(Case(case.name, of_rms_norm(case)) for case in rms_norm.cases()),
        Case("strided residual", strided_residual),
    ]


OP = Op(
    name="add_rms_norm",
    check=check,
    autocast="widest",
    eager=eager,
    save=save,
    gradient=gradient,
    sharding=Sharding("...C, ...C, C -> ...C, ...C", "..."),
    cost=cost,
    cases=cases,
    at_model_size=at_model_size,
)
BACKWARD = Op(
    name="add_rms_norm_backward",
    check=backward_check,
    eager=backward_eager,
    sharding=Sharding("...C, ...C, ...C, C -> ...C, C", "..."),
    cost=backward_cost,
)
