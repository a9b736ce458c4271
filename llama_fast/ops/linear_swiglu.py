"""Linear layer and SwiGLU's elementwise part in one: the first half of a Llama's MLP.

    h[..., f] = silu(gate[..., f]) · up[..., f],  silu(z) = z / (1 + e^-z)
    gate[..., f] = Σ_i x[..., i] · weight[f, i]        up[..., f] = Σ_i x[..., i] · weight[F + f, i]

Shapes    x (..., C_in), weight (2F, C_in): gate's rows, then up's; h (..., F)
Layout    x is contiguous in C_in, its other dims have any stride; weight and h are contiguous
Rounding  that of `linear` and `swiglu` one after the other: gate and up to x's dtype, then
          silu(gate), then h

Gradient: `swiglu`'s and then `linear`'s. Nothing but x is kept for it, so gate and up are computed
anew; the public function keeps them instead, by calling the two ops.
"""

from __future__ import annotations

import torch

from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from .inputs import randn
from .linear import OP as LINEAR
from .linear import check_width, linear
from .linear_swiglu_quantized import linear_swiglu_quantized
from .quantized_weight import QuantizedWeight
from .swiglu import BACKWARD as SWIGLU_BACKWARD
from .swiglu import OP as SWIGLU
from .swiglu import swiglu


def linear_swiglu(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """silu(x W_gateᵀ) · (x W_upᵀ), with the weight's rows those of gate and then those of up.

    x       (..., C_in), float32, bfloat16 or float16, contiguous in C_in
    weight  (2F, C_in), contiguous, of x's dtype and device; or a QuantizedWeight, which the op
            `linear_swiglu_quantized` multiplies by
    Returns h (..., F), contiguous, of x's dtype. Raises ShapeError when the arguments do not fit.
    """
    learns = isinstance(weight, torch.Tensor) and weight.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or learns):
        return swiglu(*linear(x, weight).chunk(2, dim=-1))
    if not isinstance(weight, QuantizedWeight):
        return OP(x, weight)
    check_width("linear_swiglu", x, weight)
    return linear_swiglu_quantized(x, *weight.arguments)


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    LINEAR.check(x, weight, "linear_swiglu")
    if weight.shape[0] % 2:
        raise ShapeError(
            f"linear_swiglu: weight has shape {tuple(weight.shape)}; it must be (2F, C_in), gate's "
            "rows and then as many of up"
        )


def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return SWIGLU.eager(*LINEAR.eager(x, weight).chunk(2, dim=-1))


def fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    return inputs, None


def gradient(saved: tuple, rest: None, needed: tuple, grad: torch.Tensor) -> tuple:
    gate, up = LINEAR(*saved).chunk(2, dim=-1)
    of_both = torch.cat(SWIGLU_BACKWARD(grad, gate, up), dim=-1)
    return LINEAR.gradient(saved, rest, needed, of_both)


def cost(x: torch.Tensor, weight: torch.Tensor) -> Cost:
    M, (rows, C_in) = x.shape[:-1].numel(), weight.shape
    elements = weight.numel() + M * (C_in + rows // 2)
    flops = LINEAR.cost(x, weight).flops + 5 * M * (rows // 2)
    return Cost(bytes=elements * x.element_size(), flops=flops)


def cases() -> list[Case]:
    def sizes(*rows: int, C_in: int, F: int, scale: float = 1.0, take=lambda x: x):
        """Gates of the order of `scale`."""

        def make(g, dtype, device):
            x = take(randn(g, *rows, C_in, dtype=dtype, device=device))
            C = x.shape[-1]
            size = scale * C**-0.5 if C else 1.0
            return x, randn(g, 2 * F, C, dtype=dtype, device=device, scale=size)

        return make

    return [
        Case("one product", sizes(1, C_in=1, F=1)),
        Case("a vector", sizes(C_in=96, F=40)),
        Case("odd", sizes(3, C_in=33, F=13)),
        Case("9 outputs", sizes(5, C_in=72, F=9)),
        Case("16 rows", sizes(16, C_in=520, F=35)),
        Case("17 rows", sizes(17, C_in=264, F=24)),
        Case("40 rows", sizes(2, 20, C_in=130, F=66)),
        Case("no rows", sizes(0, C_in=16, F=8)),
        Case("no outputs", sizes(3, C_in=16, F=0)),
        Case("no inputs", sizes(3, C_in=0, F=8)),
        Case("decode", sizes(1, 1, C_in=2048, F=128)),
        Case("saturated", sizes(6, C_in=136, F=21, scale=30.0)),
        Case("columns of a wider tensor", sizes(6, C_in=300, F=24, take=lambda x: x[:, 21:278])),
        Case("last token of each row", sizes(3, 9, C_in=64, F=48, take=lambda x: x[:, -1:])),
    ]


OP = Op(
    name="linear_swiglu",
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
