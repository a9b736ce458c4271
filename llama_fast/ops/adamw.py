"""AdamW: one step of a parameter, in one pass over it, its gradient and its two moments.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), with the bias corrections of
Kingma and Ba's Adam (2015). With g = grad · grad_scale and step counted from 1:

    m = m + (1 - beta1) (g - m)          v = beta2 · v + (1 - beta2) g²
    param = param · (1 - lr · weight_decay)
            - lr / (1 - beta1^step) · m / (√v / √(1 - beta2^step) + eps)

Shapes    param, grad, exp_avg (m) and exp_avg_sq (v) of one shape (...), n elements; of 8-bit
          moments also exp_avg_scale and exp_avg_sq_scale (⌈n / 256⌉,) (quantized_moments.py)
Layout    all are contiguous
Rounding  everything in float32. A bfloat16 param is rounded once, stochastically by `seed`, or to
          the nearest without one; so are 8-bit moments, after the step has used them unrounded

Plain rounding of a bfloat16 weight loses every update below 2⁻⁹ of it, which most are. Stochastic
rounding keeps their mean (random_bits.py): the same seed draws the same bits on every backend.

`grad_scale` is what the gradient is multiplied by where it is read: one over the tokens that a step
has summed over, the factor of a clip, or both. param and the moments are written; the op has no
gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from . import checks
from .inputs import randn
from .quantized_moments import FIRST, SECOND, blocks_of, dequantize, quantize
from .random_bits import to_bfloat16
from .rms_norm import accumulate

# Of which words each draws: param those of stream 0, the moments together those of stream 1.
PARAM, MOMENTS = 0, 1


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float = 1.0,
    seed: int | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
) -> None:
    """Takes one step of AdamW, in place.

    param         (...), float32 or bfloat16, contiguous; written
    grad          (...), float32 or bfloat16, contiguous, on param's device
    exp_avg       (...), the first moment, float32; or int8, with exp_avg_scale; written
    exp_avg_sq    (...), the second moment, float32; or uint8, with exp_avg_sq_scale; written
    step          the number of this step, from 1
    lr, betas, eps, weight_decay  as in `torch.optim.AdamW`
    grad_scale    what grad is multiplied by
    seed          rounds stochastically what is not float32; another one for each param and step.
                  None rounds to the nearest
    exp_avg_scale, exp_avg_sq_scale  (⌈n / 256⌉,) float32, of 8-bit moments; written
    Begin with moments and scales of zeros. Raises ShapeError when the arguments do not fit, and
    GradientError where a gradient of it would be recorded: call it under torch.no_grad().
    """
    given = (
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        lr,
        *betas,
        eps,
        weight_decay,
        grad_scale,
        seed,
    )
    if exp_avg_scale is None and exp_avg_sq_scale is None:
        OP(*given)
    else:
        OP(*given, exp_avg_scale, exp_avg_sq_scale)


def check(
    param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0,
    seed=None, exp_avg_scale=None, exp_avg_sq_scale=None,
) -> None:  # fmt: skip
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ShapeError(
            f"adamw: param is {param.dtype}; it must be torch.float32 or torch.bfloat16: the range "
            "of torch.float16 is too small for weights in training"
        )
    dtype = accumulate(param.dtype)
    if grad.dtype not in (torch.float32, torch.bfloat16, dtype):
        raise ShapeError(
            f"adamw: grad is {grad.dtype}; it must be torch.float32 or torch.bfloat16: convert it"
        )
    eight_bits = exp_avg_scale is not None
    if eight_bits != (exp_avg_sq_scale is not None):
        raise ShapeError("adamw: exp_avg_scale and exp_avg_sq_scale go together; one is missing")
    kinds = {
        "grad": (grad, grad.dtype, param.shape),
        "exp_avg": (exp_avg, FIRST.dtype if eight_bits else dtype, param.shape),
        "exp_avg_sq": (exp_avg_sq, SECOND.dtype if eight_bits else dtype, param.shape),
    }
    if eight_bits:
        shape = (blocks_of(param.numel()),)
        kinds["exp_avg_scale"] = exp_avg_scale, dtype, shape
        kinds["exp_avg_sq_scale"] = exp_avg_sq_scale, dtype, shape
    for name, (x, needed, shape) in kinds.items():
        if x.dtype is not needed or x.device != param.device or x.shape != torch.Size(shape):
            raise ShapeError(
                f"adamw: {name} is {checks.describe(x)}; it must be {needed} {tuple(shape)} on "
                f"{param.device}"
            )
    for name, (x, *_) in {"param": (param,), **kinds}.items():
        if not x.is_contiguous():
            raise ShapeError(f"adamw: {name} has strides {x.stride()}; it must be contiguous")
    _check_numbers(step, lr, beta1, beta2, eps, weight_decay, seed)


def _check_numbers(step, lr, beta1, beta2, eps, weight_decay, seed) -> None:
    if step < 1:
        raise ShapeError(f"adamw: step is {step}; the first step is 1")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ShapeError(f"adamw: {name} is {value}; it must be a number from 0 on")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ShapeError(f"adamw: {name} is {value}; it must be in [0, 1)")
    if seed is not None and seed < 0:
        raise ShapeError(f"adamw: seed is {seed}; it must be from 0 on, or None")


def eager(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    seed: int | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
) -> None:
    dtype = accumulate(param.dtype)
    p, g = param.to(dtype), grad.to(dtype) * grad_scale
    eight_bits = exp_avg_scale is not None
    m = dequantize(exp_avg, exp_avg_scale, FIRST) if eight_bits else exp_avg
    v = dequantize(exp_avg_sq, exp_avg_sq_scale, SECOND) if eight_bits else exp_avg_sq
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    denominator = v.sqrt() * (1 - beta2**step) ** -0.5 + eps
    p = p * (1 - lr * weight_decay) - m * (lr / (1 - beta1**step)) / denominator
    if param.dtype is torch.bfloat16 and seed is not None:
        p = to_bfloat16(p, seed, PARAM)
    param.copy_(p)
    if eight_bits:
        m, first = quantize(m, FIRST, seed, MOMENTS)
        v, second = quantize(v, SECOND, seed, MOMENTS)
        exp_avg_scale.copy_(first)
        exp_avg_sq_scale.copy_(second)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def fake(*args: Tensor | float | None) -> None:
    return None


def cost(param, grad, exp_avg, exp_avg_sq, *numbers_and_scales) -> Cost:
    """The gradient read, all else read and written."""
    scales = (x for x in numbers_and_scales[8:] if x is not None)
    written = sum(x.nbytes for x in (param, exp_avg, exp_avg_sq, *scales))
    eight_bits = exp_avg.dtype is FIRST.dtype
    return Cost(2 * written + grad.nbytes, (40 if eight_bits else 15) * param.numel())


def variant(param, grad, exp_avg, *others) -> str:
    return "int8" if exp_avg.dtype is FIRST.dtype else ""


def cases() -> list[Case]:
    def make(*shape, eight_bits=False, step=3, seed=None, grad_dtype=None, scale=1.0, size=1.0):
        """size: of the gradient; the moments are those of gradients of 1."""

        def arguments(g, dtype, device):
            kind = {"dtype": torch.float32, "device": device}
            param = randn(g, *shape, dtype=dtype, device=device)
            grad = randn(g, *shape, dtype=grad_dtype or dtype, device=device, scale=size)
            m, v = randn(g, *shape, **kind, scale=0.3), randn(g, *shape, **kind).square()
            scales = (None, None)
            if eight_bits:
                m, first = quantize(m, FIRST, None, MOMENTS)
                v, second = quantize(v, SECOND, None, MOMENTS)
                scales = first, second
            numbers = (step, 1e-2, 0.9, 0.99, 1e-8, 0.1, scale, seed)
            return param, grad, m, v, *numbers, *scales

        return arguments

    dtypes = (torch.float32, torch.bfloat16)

    def case(name, *shape, **options):
        return Case(name, make(*shape, **options), dtypes)

    both = [
        case("one element", 1),
        case("odd", 5, 123),
        case("a matrix", 33, 64, step=1),
        case("no elements", 0, 8),
        case("scaled gradient", 300, scale=0.01, size=50.0),
        case("float32 gradient", 7, 77, grad_dtype=torch.float32),
        case("bfloat16 gradient", 7, 77, grad_dtype=torch.bfloat16),
        case("rounded stochastically", 3, 517, seed=12345),
        case("a tiny gradient", 300, size=1e-18),
        case("a late step", 300, step=100_000),
    ]
    eight = [
        case("8 bits, one element", 1, eight_bits=True),
        case("8 bits, a block", 256, eight_bits=True),
        case("8 bits, odd", 7, 123, eight_bits=True),
        case("8 bits, no elements", 0, eight_bits=True),
        case("8 bits, rounded stochastically", 3, 517, eight_bits=True, seed=2**40 + 7),
        case("8 bits, bfloat16 gradient", 600, eight_bits=True, grad_dtype=torch.bfloat16),
    ]
    return both + eight


OP = Op(
    name="adamw",
    check=check,
    constants=("exp_avg_scale", "exp_avg_sq_scale"),
    writes=("param", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"),
    eager=eager,
    fake=fake,
    cost=cost,
    cases=cases,
    variant=variant,
)
