"""Linear layer without bias: y = x Wᵀ.

    y[..., o] = Σ_i x[..., i] · weight[o, i]

Shapes    x (..., C_in), weight (C_out, C_in), y (..., C_out); the M = product of (...) rows of x
Layout    x is contiguous in C_in, its other dims have any stride; weight and y are contiguous
Rounding  products and sums in float32, one rounding to x's dtype at the end

Gradients, with g the gradient of y, each a matrix product over the flattened rows:
    dx = g W        dw = gᵀ x
They are two ops, so that a frozen weight or a first layer pays for one of them only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from . import checks
from .inputs import randn
from .linear_quantized import linear_quantized
from .quantized_weight import QuantizedWeight


def linear(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Multiplies each row of `x` by the transposed weight.

    x       (..., C_in), float32, bfloat16 or float16, contiguous in C_in
    weight  (C_out, C_in), contiguous, of x's dtype and device; or a QuantizedWeight, which the op
            `linear_quantized` multiplies by
    Returns y (..., C_out), contiguous, of x's dtype. Raises ShapeError when the arguments do not
    fit.
    """
    if not isinstance(weight, QuantizedWeight):
        return OP(x, weight)
    check_width("linear", x, weight)
    return linear_quantized(x, *weight.arguments)


def check_width(op: str, x: torch.Tensor, weight: QuantizedWeight) -> None:
    """What the weight's `arguments` no longer say: its own C_in."""
    if x.shape[-1:] != weight.shape[1:]:
        raise ShapeError(
            f"{op}: x has shape {tuple(x.shape)} and weight {weight.shape}; the last dim of both "
            "must be C_in"
        )


def check(x: torch.Tensor, weight: torch.Tensor, op: str = "linear") -> None:
    checks.same_kind(op, "x", x, weight=weight)
    checks.rows(op, "x", x, "(..., C_in)")
    checks.ndim(op, "weight", weight, 2, "(C_out, C_in)")
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; the last dim "
            f"of both must be C_in, and {x.shape[-1]} is not {weight.shape[1]}"
        )
    if not weight.is_contiguous():
        raise ShapeError(
            f"{op}: weight has strides {weight.stride()}; it must be contiguous (C_out, C_in): "
            "call .contiguous() on it once, not in every step"
        )


def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight).contiguous()


def fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    return inputs, None


def gradient(saved: tuple, rest: None, needed: tuple, grad: torch.Tensor) -> tuple:
    x, weight = saved
    dx = BACKWARD_X(grad, weight) if needed[0] else None
    dw = BACKWARD_WEIGHT(grad, x) if needed[1] else None
    return dx, dw


def check_backward_x(grad: torch.Tensor, weight: torch.Tensor) -> None:
    checks.same_kind("linear_backward_x", "grad", grad, weight=weight)
    checks.ndim("linear_backward_x", "weight", weight, 2, "(C_out, C_in)")
    needed = (*grad.shape[:-1], weight.shape[0])
    checks.shape("linear_backward_x", "grad", grad, needed, "(..., C_out)")


def backward_x_eager(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.matmul(grad, weight).contiguous()


def backward_x_fake(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def check_backward_weight(grad: torch.Tensor, x: torch.Tensor) -> None:
    checks.same_kind("linear_backward_weight", "grad", grad, x=x)
    needed = (*grad.shape[:-1], x.shape[-1])
    checks.shape("linear_backward_weight", "x", x, needed, "(..., C_in)")


def backward_weight_eager(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # Rows are counted, not left to reshape as -1: it cannot tell where a tensor is empty.
    M = grad.shape[:-1].numel()
    return grad.reshape(M, grad.shape[-1]).t().mm(x.reshape(M, x.shape[-1]))


def backward_weight_fake(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def cost(x: torch.Tensor, weight: torch.Tensor) -> Cost:
    M, (C_out, C_in) = x.shape[:-1].numel(), weight.shape
    elements = weight.numel() + M * (C_in + C_out)
    return Cost(bytes=elements * x.element_size(), flops=2 * M * C_out * C_in)


def backward_x_cost(grad: torch.Tensor, weight: torch.Tensor) -> Cost:
    M, (C_out, C_in) = grad.shape[:-1].numel(), weight.shape
    elements = weight.numel() + M * (C_in + C_out)
    return Cost(bytes=elements * grad.element_size(), flops=2 * M * C_out * C_in)


def backward_weight_cost(grad: torch.Tensor, x: torch.Tensor) -> Cost:
    M, C_out, C_in = grad.shape[:-1].numel(), grad.shape[-1], x.shape[-1]
    elements = C_out * C_in + M * (C_in + C_out)
    return Cost(bytes=elements * grad.element_size(), flops=2 * M * C_out * C_in)


def cases() -> list[Case]:
    def sizes(*rows: int, C_in: int, C_out: int):
        # A weight of the published models' scale: rows of y come out of the order of 1.
        return lambda g, dtype, device: (
            randn(g, *rows, C_in, dtype=dtype, device=device),
            randn(g, C_out, C_in, dtype=dtype, device=device, scale=C_in**-0.5 if C_in else 1.0),
        )

    def view(of: tuple[int, ...], take, C_out: int):
        def make(g, dtype, device):
            x = take(randn(g, *of, dtype=dtype, device=device))
            weight = randn(g, C_out, x.shape[-1], dtype=dtype, device=device)
            return x, weight

        return make

    def outliers(g, dtype, device):
        x, weight = sizes(3, C_in=1030, C_out=21)(g, dtype, device)
        x[:, 7] *= 200
        return x, weight

    return [
        Case("one product", sizes(1, C_in=1, C_out=1)),
        Case("a vector", sizes(C_in=96, C_out=40)),
        Case("1 row", sizes(1, C_in=128, C_out=64)),
        Case("2 rows", sizes(2, C_in=33, C_out=65)),
        Case("3 rows", sizes(3, C_in=7, C_out=1)),
        Case("5 rows", sizes(5, C_in=65, C_out=33)),
        Case("16 rows", sizes(16, C_in=515, C_out=35)),
        Case("17 rows", sizes(17, C_in=515, C_out=35)),
        Case("40 rows", sizes(2, 20, C_in=258, C_out=130)),
        Case("300 rows", sizes(300, C_in=67, C_out=19)),
        Case("no rows", sizes(0, C_in=16, C_out=8)),
        Case("no outputs", sizes(3, C_in=16, C_out=0)),
        Case("no inputs", sizes(3, C_in=0, C_out=8)),
        Case("decode", sizes(1, 1, C_in=2048, C_out=256)),
        Case("long rows", sizes(4, C_in=14336, C_out=8)),
        Case("outliers", outliers),
        Case("columns of a wider tensor", view((6, 300), lambda x: x[:, 21:278], 24)),
        Case("last token of each row", view((3, 9, 64), lambda x: x[:, -1:], 48)),
        Case("heads of a transposed tensor", view((2, 7, 5, 64), lambda x: x.transpose(1, 2), 12)),
    ]


OP = Op(
    name="linear",
    schema="(Tensor x, Tensor weight) -> Tensor",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    cost=cost,
    cases=cases,
)
BACKWARD_X = Op(
    name="linear_backward_x",
    schema="(Tensor grad, Tensor weight) -> Tensor",
    check=check_backward_x,
    eager=backward_x_eager,
    fake=backward_x_fake,
    cost=backward_x_cost,
)
BACKWARD_WEIGHT = Op(
    name="linear_backward_weight",
    schema="(Tensor grad, Tensor x) -> Tensor",
    check=check_backward_weight,
    eager=backward_weight_eager,
    fake=backward_weight_fake,
    cost=backward_weight_cost,
)
