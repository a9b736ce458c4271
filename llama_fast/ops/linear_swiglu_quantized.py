"""`linear_swiglu` with a weight of 8-bit or 4-bit integers.

    h = silu(gate) · up, gate and up the halves of linear_quantized(x, …)

Shapes    x (..., C_in) → h (..., F); the weight is that of `linear_quantized` with C_out = 2F:
          gate's rows, then up's
Layout    that of `linear_quantized`; h is contiguous
Rounding  that of `linear_quantized` and `swiglu` one after the other

Gradient: theirs. Nothing but x is kept for it, so gate and up are computed anew.
"""

from __future__ import annotations

import torch

from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from .inputs import randn
from .linear_quantized import OP as LINEAR
from .quantized_weight import QuantizedWeight
from .swiglu import BACKWARD as SWIGLU_BACKWARD
from .swiglu import OP as SWIGLU


def linear_swiglu_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """silu(x W_gateᵀ) · (x W_upᵀ) with a weight of integers, gate's rows first.

    `llama_fast.linear_swiglu(x, weight)` calls this for a QuantizedWeight, which holds the
    arguments; they are those of `linear_quantized`.

    C_out  rows of the weight: 2F
    Returns h (..., F), contiguous, of x's dtype. Raises ShapeError when the arguments do not fit.
    """
    return OP(x, codes, scales, offsets, C_out, bits, group_size)


def check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> None:
    op = "linear_swiglu_quantized"
    LINEAR.check(x, codes, scales, offsets, C_out, bits, group_size, op)
    if C_out % 2:
        raise ShapeError(
            f"{op}: the weight has {C_out} rows; it must have 2F, gate's and then as many of up"
        )


def eager(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    gate_up = LINEAR.eager(x, codes, scales, offsets, C_out, bits, group_size)
    return SWIGLU.eager(*gate_up.chunk(2, dim=-1))


def fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], C_out // 2))


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    return inputs[:4], inputs[4:]


def gradient(saved: tuple, rest: tuple, needed: tuple, grad: torch.Tensor) -> tuple:
    inputs = (*saved, *rest)
    gate, up = LINEAR(*inputs).chunk(2, dim=-1)
    of_both = torch.cat(SWIGLU_BACKWARD(grad, gate, up), dim=-1)
    return LINEAR.gradient(*LINEAR.save(inputs, of_both), needed, of_both)


def cost(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> Cost:
    M, F = x.shape[:-1].numel(), C_out // 2
    product = LINEAR.cost(x, codes, scales, offsets, C_out, bits, group_size)
    return Cost(bytes=product.bytes - M * F * x.element_size(), flops=product.flops + 5 * M * F)


def cases() -> list[Case]:
    def sizes(*rows: int, C_in: int, F: int, bits: int, group_size: int, symmetric: bool = True,
              take=lambda x: x):  # fmt: skip
        def make(g, dtype, device):
            x = take(randn(g, *rows, C_in, dtype=dtype, device=device))
            C = x.shape[-1]
            weight = randn(g, 2 * F, C, dtype=torch.float32, device=device, scale=max(C, 1) ** -0.5)
            return x, *QuantizedWeight.from_float(weight, bits, group_size, symmetric).arguments

        return make

    kinds = [
        Case(
            f"{bits} bits, {'symmetric' if symmetric else 'with offsets'}, {M} rows",
            sizes(M, C_in=330, F=37, bits=bits, group_size=group_size, symmetric=symmetric),
        )
        for bits, group_size in ((8, 64), (4, 32))
        for symmetric in (True, False)
        for M in (3, 16)
    ]
    return [
        *kinds,
        Case("one product", sizes(1, C_in=1, F=1, bits=8, group_size=32)),
        Case("a vector", sizes(C_in=96, F=40, bits=4, group_size=32)),
        Case("9 outputs", sizes(5, C_in=72, F=9, bits=8, group_size=128)),
        Case("17 rows", sizes(17, C_in=130, F=24, bits=8, group_size=64)),
        Case("no rows", sizes(0, C_in=64, F=8, bits=4, group_size=32)),
        Case("no outputs", sizes(3, C_in=64, F=0, bits=8, group_size=64)),
        Case("no inputs", sizes(3, C_in=0, F=8, bits=4, group_size=32)),
        Case("decode, 8 bits", sizes(1, 1, C_in=2048, F=128, bits=8, group_size=64)),
        Case("decode, 4 bits", sizes(1, 1, C_in=2048, F=128, bits=4, group_size=32)),
        Case(
            "columns of a wider tensor",
            sizes(6, C_in=300, F=24, bits=8, group_size=64, take=lambda x: x[:, 21:278]),
        ),
        Case(
            "last token of each row",
            sizes(3, 9, C_in=64, F=48, bits=4, group_size=32, take=lambda x: x[:, -1:]),
        ),
    ]


OP = Op(
    name="linear_swiglu_quantized",
    schema="(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, "
    "int C_out, int bits, int group_size) -> Tensor",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("scales", "offsets"),
    cost=cost,
    cases=cases,
)
