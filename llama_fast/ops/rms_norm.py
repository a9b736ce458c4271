"""RMSNorm: y = x / sqrt(mean(x²) + eps) · weight, over the last dim.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), as Llama 3 uses it.

Shapes    x (..., C), weight (C,) → y (..., C)
Layout    x is contiguous in C, its other dims have any stride; y is contiguous
Rounding  normalise in float32, cast to x's dtype, then multiply by the weight

Gradient, with r = 1 / sqrt(mean(x²) + eps), x̂ = x·r and g the gradient of y:
    dx = r · (g·w - x̂ · mean(g·w · x̂))        dw = Σ over rows of g · x̂
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dispatch import Case, Cost, Op, Sharding
from . import checks
from .inputs import randn
from .model_inputs import ModelInputs


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Root-mean-square normalisation over the last dim.

    x       (..., C), float32, bfloat16 or float16, contiguous in C
    weight  (C,), of x's dtype and device
    eps     added to the mean of squares
    Returns y (..., C), contiguous, of x's dtype. Raises ShapeError when the arguments do not fit.
    """
    return OP(x, weight, eps)


def check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    checks.same_kind("rms_norm", "x", x, weight=weight)
    checks.rows("rms_norm", "x", x, "(..., C)")
    checks.shape("rms_norm", "weight", weight, x.shape[-1:], "(C,)")


def eager(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    xf = x.to(accumulate(x.dtype))
    xf = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf.to(x.dtype) * weight).contiguous()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types; float64 stays, so that the reference can be its own oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def backward_eager(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw = backward_unrounded(grad, x, weight, eps)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)


def backward_unrounded(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw) in the dtype of the computation."""
    dtype = accumulate(x.dtype)
    xf, gf = x.to(dtype), grad.to(dtype)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    x_hat, gw = xf * r, gf * weight.to(dtype)
    dx = r * (gw - x_hat * (gw * x_hat).mean(-1, keepdim=True))
    return dx, (gf * x_hat)[None].flatten(0, -2).sum(0)


def backward_check(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check(x, weight, eps)
    checks.same_kind("rms_norm_backward", "x", x, grad=grad)
    checks.shape("rms_norm_backward", "grad", grad, x.shape, "x's shape")


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    x, weight, eps = inputs
    return (x, weight), eps


def gradient(saved: tuple, eps: float, needed: tuple, grad: torch.Tensor) -> tuple:
    x, weight = saved
    return *BACKWARD(grad, x, weight, eps), None


def cost(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    return Cost(bytes=(2 * x.numel() + weight.numel()) * x.element_size(), flops=4 * x.numel())


def backward_cost(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Cost:
    elements = 3 * x.numel() + 2 * weight.numel()
    return Cost(bytes=elements * x.element_size(), flops=11 * x.numel())


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    C = m.config.dim
    return {"rms_norm": lambda: (m.rows(C), m.randn(C), m.config.norm_eps)}


def cases() -> list[Case]:
    def rows(*shape: int):
        return lambda g, dtype, device: (
            randn(g, *shape, dtype=dtype, device=device),
            randn(g, shape[-1], dtype=dtype, device=device),
            1e-5,
        )

    def view(of: tuple[int, ...], take):
        def make(g, dtype, device):
            x = take(randn(g, *of, dtype=dtype, device=device))
            return x, randn(g, x.shape[-1], dtype=dtype, device=device), 1e-6

        return make

    def outliers(g, dtype, device):
        x, weight, eps = rows(7, 515)(g, dtype, device)
        x[:, 3] *= 200
        return x, weight, eps

    return [
        Case("one row", rows(2048)),
        Case("one element", rows(300, 1)),
        Case("odd", rows(5, 123, 123)),
        Case("no rows", rows(0, 64)),
        Case("8b decode", rows(1, 1, 4096)),
        Case("1b prefill", rows(2, 33, 2048)),
        Case("columns of a wider tensor", view((6, 300), lambda x: x[:, 20:277])),
        Case("every second row", view((4, 10, 96), lambda x: x[:, ::2])),
        Case("heads of a transposed tensor", view((2, 7, 5, 64), lambda x: x.transpose(1, 2))),
        Case("outliers", outliers),
        Case("tiny", lambda g, dtype, device: (
            randn(g, 4, 256, dtype=dtype, device=device, scale=1e-4),
            randn(g, 256, dtype=dtype, device=device),
            1e-5,
        )),
    ]  # fmt: skip


OP = Op(
    name="rms_norm",
    check=check,
    autocast="widest",
    eager=eager,
    save=save,
    gradient=gradient,
    sharding=Sharding("...C, C -> ...C", "..."),
    cost=cost,
    cases=cases,
    at_model_size=at_model_size,
)
BACKWARD = Op(
    name="rms_norm_backward",
    check=backward_check,
    eager=backward_eager,
    sharding=Sharding("...C, ...C, C -> ...C, C", "..."),
    cost=backward_cost,
)
