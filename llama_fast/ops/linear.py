"""Linear layer without bias: y = x Wᵀ, of a float or a quantised weight, with or without SwiGLU.

    y[..., o] = Σ_i x[..., i] · w[o, i]
    epilogue "swiglu", the first half of a Llama's MLP; w's rows are those of gate, then of up:
    h[..., f] = silu(y[..., f]) · y[..., F + f],  silu(z) = z / (1 + e^-z)

Shapes    x (..., C_in), w (C_out, C_in) → y (..., C_out), or h (..., F) with C_out = 2F; the
          M = product of (...) rows of x
          w is `weight`; or, of 8-bit or 4-bit integers, what weight, scales and minima stand for
          (quantized_layout.py)
Layout    x is contiguous in C_in, its other dims have any stride; all else is contiguous
Rounding  products and sums in float32, one rounding to x's dtype at the end; then as in swiglu: to
          x's dtype after silu(gate) and after the product with up
          Beside a quantised weight an x of a half type is rounded to 8 bits first, for each row and
          group apart:
              s = max |x| / 127 in float32        x_q = x / s, rounded to even; 0 where s is 0
              y = Σ over groups of s · scale · Σ level(q) · x_q
                                            (or s · (scale · Σ q · x_q + minimum · Σ x_q))
          so that the sums within a group may be those of integers. A float32 x is not rounded. A
          row of x that is not finite gives outputs that are not finite.

Gradients, with g the gradient of y, each a matrix product over the flattened rows:
    dx = g W        dw = gᵀ x
They are two ops, so that a frozen weight or a first layer pays for one of them only. A quantised
weight is frozen, what it stands for is rounded to the dtype of g before it is multiplied, and the
rounding of x counts as the identity. With the epilogue nothing but x is kept, so gate and up are
computed anew; the public function keeps them, by calling two ops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Cost, Op, Sharding
from ..errors import ShapeError
from . import checks
from .linear_cases import cases
from .model_inputs import WEIGHT_FORMATS, ModelInputs
from .quantized_layout import check_weight, dequantized_blocks, rounded
from .quantized_weight import QuantizedWeight
from .rms_norm import accumulate
from .swiglu import BACKWARD as SWIGLU_BACKWARD
from .swiglu import OP as SWIGLU
from .swiglu import swiglu


def linear(x: Tensor, weight: Tensor | QuantizedWeight, *, epilogue: str | None = None) -> Tensor:
    """Multiplies each row of `x` by the transposed weight.

    x         (..., C_in), float32, bfloat16 or float16, contiguous in C_in
    weight    (C_out, C_in), contiguous, of x's dtype and device; or a QuantizedWeight
    epilogue  "swiglu": silu(x W_gateᵀ) · (x W_upᵀ) of a weight (2F, C_in), gate's rows first
    Returns y (..., C_out), or (..., F) with the epilogue, contiguous, of x's dtype. Raises
    ShapeError when the arguments do not fit, or for another epilogue.
    """
    quantized = isinstance(weight, QuantizedWeight)
    if quantized and x.shape[-1:] != weight.shape[1:]:  # its arguments no longer say its own C_in
        raise wrong_width("linear", x, weight)
    if epilogue is None:
        return OP(x, *weight.arguments) if quantized else OP(x, weight)
    if epilogue != "swiglu":
        raise ShapeError(f"linear: epilogue is {epilogue!r}; it must be 'swiglu' or None")
    learns = not quantized and weight.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or learns):
        return swiglu(*linear(x, weight).chunk(2, dim=-1))
    if quantized:
        return OP(x, *weight.arguments, epilogue)
    return OP(x, weight, None, None, 0, 0, 0, epilogue)


def wrong_width(op: str, x: Tensor, weight: Tensor | QuantizedWeight) -> ShapeError:
    widths = f", and {x.shape[-1]} is not {weight.shape[1]}" if x.ndim else ""
    return ShapeError(
        f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; the last dim of "
        f"both must be C_in{widths}"
    )


def check(
    x, weight, scales=None, minima=None, C_out=0, bits=0, group_size=0, epilogue="", op="linear"
) -> None:
    if scales is None:
        checks.same_kind(op, "x", x, weight=weight)
        checks.rows(op, "x", x, "(..., C_in)")
        checks.ndim(op, "weight", weight, 2, "(C_out, C_in)")
        if x.shape[-1] != weight.shape[1]:
            raise wrong_width(op, x, weight)
        if not weight.is_contiguous():
            raise ShapeError(
                f"{op}: weight has strides {weight.stride()}; it must be contiguous (C_out, C_in): "
                "call .contiguous() on it once, not in every step"
            )
    else:
        checks.same_kind(op, "x", x)
        checks.rows(op, "x", x, "(..., C_in)")
        check_weight(op, x, weight, scales, minima, (C_out, x.shape[-1]), bits, group_size)
    if epilogue not in ("", "swiglu"):
        raise ShapeError(f"{op}: epilogue is {epilogue!r}; it must be 'swiglu' or empty")
    rows = C_out if scales is not None else weight.shape[0]
    if epilogue and rows % 2:
        raise ShapeError(
            f"{op}: the weight has {rows} rows; with swiglu it must be (2F, C_in), gate's rows and "
            "then as many of up"
        )


def eager(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    minima: Tensor | None = None,
    C_out: int = 0,
    bits: int = 0,
    group_size: int = 0,
    epilogue: str = "",
) -> Tensor:
    if scales is None:
        y = F.linear(x, weight).contiguous()
    else:
        y = _eager_quantized(x, weight, scales, minima, C_out, bits, group_size)
    return SWIGLU.eager(*y.chunk(2, dim=-1)) if epilogue else y


def _eager_quantized(x, values, scales, minima, C_out, bits, group_size) -> Tensor:
    dtype = accumulate(x.dtype)
    x_hat = x if x.dtype is dtype else rounded(x, group_size)
    x_hat = F.pad(x_hat, (0, -x.shape[-1] % group_size))
    # Made beforehand: small results between large temporaries would keep the memory of all of them.
    y = x_hat.new_empty((*x.shape[:-1], C_out))
    start = 0
    for w in dequantized_blocks(values, scales, minima, bits, group_size, dtype):
        part = y[..., start : start + len(w)]
        part.copy_(F.linear(x_hat, w[: part.shape[-1]]))
        start += len(w)
    return y.to(x.dtype)


def fake(x, weight, scales=None, minima=None, C_out=0, bits=0, group_size=0, epilogue="") -> Tensor:
    width = weight.shape[0] if scales is None else C_out
    return x.new_empty((*x.shape[:-1], width // 2 if epilogue else width))


def save(inputs: tuple, output: Tensor) -> tuple:
    x, weight, scales, minima, *form, epilogue = inputs
    learns = scales is None and weight.requires_grad
    kept = x if learns or epilogue else None  # the gradient of a frozen weight needs no x
    return (kept, weight, scales, minima), (x.shape[-1], *form, epilogue)


def gradient(
    saved: tuple, scalars: tuple, needed: tuple, grad: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, scales, minima = saved
    C_in, C_out, bits, group_size, epilogue = scalars
    if epilogue:
        gate, up = OP(x, weight, scales, minima, C_out, bits, group_size).chunk(2, dim=-1)
        grad = torch.cat(SWIGLU_BACKWARD(grad, gate, up), dim=-1)
    form = () if scales is None else (scales, minima, C_in, bits, group_size)
    dx = BACKWARD_X(grad, weight, *form) if needed[0] else None
    dw = BACKWARD_WEIGHT(grad, x) if needed[1] else None
    return dx, dw, *[None] * 6


def check_backward_x(grad, weight, scales=None, minima=None, C_in=0, bits=0, group_size=0) -> None:
    op = "linear_backward_x"
    if scales is not None:
        checks.same_kind(op, "grad", grad)
        checks.rows(op, "grad", grad, "(..., C_out)")
        size = (grad.shape[-1], C_in)
        return check_weight(op, grad, weight, scales, minima, size, bits, group_size)
    checks.same_kind(op, "grad", grad, weight=weight)
    checks.ndim(op, "weight", weight, 2, "(C_out, C_in)")
    checks.shape(op, "grad", grad, (*grad.shape[:-1], weight.shape[0]), "(..., C_out)")


def backward_x_eager(
    grad: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    minima: Tensor | None = None,
    C_in: int = 0,
    bits: int = 0,
    group_size: int = 0,
) -> Tensor:
    if scales is None:
        return torch.matmul(grad, weight).contiguous()
    dx = grad.new_empty((*grad.shape[:-1], C_in))
    dtype, start = accumulate(grad.dtype), 0
    for w in dequantized_blocks(weight, scales, minima, bits, group_size, dtype, dim=1):
        part = dx[..., start : start + w.shape[1]]
        part.copy_(torch.matmul(grad, w[: grad.shape[-1], : part.shape[-1]].to(grad.dtype)))
        start += w.shape[1]
    return dx


def backward_x_fake(grad, weight, scales=None, minima=None, C_in=0, bits=0, group_size=0) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1] if scales is None else C_in))


def check_backward_weight(grad: Tensor, x: Tensor) -> None:
    checks.same_kind("linear_backward_weight", "grad", grad, x=x)
    needed = (*grad.shape[:-1], x.shape[-1])
    checks.shape("linear_backward_weight", "x", x, needed, "(..., C_in)")


def backward_weight_eager(grad: Tensor, x: Tensor) -> Tensor:
    # Rows are counted, not left to reshape as -1: it cannot tell where a tensor is empty.
    M = grad.shape[:-1].numel()
    return grad.reshape(M, grad.shape[-1]).t().mm(x.reshape(M, x.shape[-1]))


def backward_weight_fake(grad: Tensor, x: Tensor) -> Tensor:
    # To infer it would fix the number of rows: a product of them is a number, not a symbol.
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def cost(x, weight, scales=None, minima=None, C_out=0, bits=0, group_size=0, epilogue="") -> Cost:
    C_out = weight.shape[0] if scales is None else C_out
    product = _product_cost(x, C_out, x.shape[-1], weight, scales, minima)
    if not epilogue:
        return product
    elements = x.shape[:-1].numel() * (C_out // 2)  # of h, where y had twice as many
    return Cost(product.bytes - elements * x.element_size(), product.flops + 5 * elements)


def backward_x_cost(grad, weight, scales=None, minima=None, C_in=0, bits=0, group_size=0) -> Cost:
    C_in = weight.shape[1] if scales is None else C_in
    return _product_cost(grad, grad.shape[-1], C_in, weight, scales, minima)


def backward_weight_cost(grad: Tensor, x: Tensor) -> Cost:
    C_out, C_in = grad.shape[-1], x.shape[-1]
    product = _product_cost(grad, C_out, C_in)
    return Cost(product.bytes + C_out * C_in * grad.element_size(), product.flops)


def _product_cost(x: Tensor, C_out: int, C_in: int, *weight: Tensor | None) -> Cost:
    M = x.shape[:-1].numel()
    moved = sum(part.nbytes for part in weight if part is not None)
    return Cost(moved + M * (C_in + C_out) * x.element_size(), 2 * M * C_out * C_in)


def sharding(x, weight, scales, minima, C_out, bits, group_size, epilogue) -> Sharding:
    """By rows, or as column- and row-parallel layers are. The rows of gate and up are one weight,
    and quantised values are packed: those stay whole."""
    whole = scales is not None or epilogue
    return Sharding("...I, OI, -, - -> ...O", "..." if whole else "... O I")


def backward_x_sharding(grad, weight, scales, minima, C_in, bits, group_size) -> Sharding:
    return Sharding("...O, OI, -, - -> ...I", "..." if scales is not None else "... O I")


def variant(x, weight, scales=None, minima=None, C_out=0, bits=0, group_size=0, epilogue="") -> str:
    return f"{epilogue} {f'int{bits}' if bits else ''}".strip()


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    """Of each matrix and of the first half of an MLP, in floats and quantised."""

    def make(matrix: str, form: tuple[int, int] | None, epilogue: str) -> tuple:
        x = m.rows(m.matrices()[matrix][1])
        if form is None:
            return x, m.weight(matrix), None, None, 0, 0, 0, epilogue
        return x, *m.quantized_weight(matrix, *form), epilogue

    return {
        " ".join(filter(None, ("linear", matrix, epilogue, name))): partial(
            make, matrix, form, epilogue
        )
        for name, form in {"": None, **WEIGHT_FORMATS}.items()
        for matrix, epilogue in (*((each, "") for each in m.matrices()), ("gate_up", "swiglu"))
    }


OP = Op(
    name="linear",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("scales", "minima"),
    sharding=sharding,
    cost=cost,
    cases=cases,
    variant=variant,
    at_model_size=at_model_size,
)
BACKWARD_X = Op(
    name="linear_backward_x",
    check=check_backward_x,
    eager=backward_x_eager,
    fake=backward_x_fake,
    sharding=backward_x_sharding,
    cost=backward_x_cost,
)
BACKWARD_WEIGHT = Op(
    name="linear_backward_weight",
    check=check_backward_weight,
    eager=backward_weight_eager,
    fake=backward_weight_fake,
    sharding=Sharding("...O, ...I -> OI", "... O I"),
    cost=backward_weight_cost,
)
