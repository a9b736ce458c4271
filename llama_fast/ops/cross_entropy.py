"""Cross entropy of a linear head, without ever holding its logits.

    logits = x Wᵀ        loss = mean over the kept rows of  log Σ_v exp(logits[v]) - logits[target]

A row is kept when its target is not `ignore_index`. Without `mean` the loss is the sum over these
rows, and n below is 1.

Shapes    x (..., C), weight (V, C), targets (...) int64 → loss (), float32 (float64 for float64)
Layout    x is contiguous in C, its other dims have any stride; weight and targets are contiguous
Rounding  logits are rounded to x's dtype, as the model's own head does; all else is in float32

Gradient, with P = softmax(logits) and Y the one-hot targets, over the n kept rows:
    dx = (P - Y) W / n        dw = (P - Y)ᵀ x / n
Both are made together with the loss, since P is at hand then: three matrix products in all, where a
backward pass that remakes the logits costs four. So the op returns (loss, dx, dw); a gradient that
nobody needs is an empty tensor and is not computed.

Without a kept row the mean is NaN, as `torch.nn.functional.cross_entropy` has it (there is nothing
to take a mean of), the sum is 0, and the gradients are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..dispatch import Case, Cost, Op, interposed
from .cross_entropy_quantized import linear_cross_entropy_quantized
from .inputs import rand, randint, randn
from .linear import BACKWARD_X, check_width
from .linear import OP as LINEAR
from .linear import check as check_linear
from .logits import LOGITS, ROWS, Wanted, check_reduction, check_targets, in_blocks
from .quantized_weight import QuantizedWeight
from .rms_norm import accumulate

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean or summed cross entropy of `linear(x, weight)` against `targets`.

    x             (..., C), float32, bfloat16 or float16, contiguous in C
    weight        (V, C), contiguous, of x's dtype and device; or a QuantizedWeight, which the op
                  `linear_cross_entropy_quantized` multiplies by
    targets       (...), int64, each in [0, V) or equal to ignore_index
    ignore_index  marks the rows that do not count
    reduction     "mean" over the rows that count, or their "sum"
    Returns the loss, a float32 scalar; when every row is ignored, a mean of NaN or a sum of 0.
    Raises ShapeError when the arguments do not fit, for another reduction, and on the CPU when a
    target is out of range.
    """
    if isinstance(weight, QuantizedWeight):
        check_width(NAME, x, weight)
        return linear_cross_entropy_quantized(
            x, *weight.arguments, targets, ignore_index=ignore_index, reduction=reduction
        )
    check_reduction(NAME, reduction)
    grad = torch.is_grad_enabled()
    need_x, need_weight = grad and x.requires_grad, grad and weight.requires_grad
    return OP(x, weight, targets, ignore_index, need_x, need_weight, reduction == "mean")[0]


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> None:
    check_linear(x, weight, NAME)
    check_targets(NAME, x, targets)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = Wanted.of(NAME, x, weight.shape[0], targets, ignore_index, mean)
    rows = x.reshape(targets.numel(), x.shape[-1])
    loss, d_logits = wanted.judge(F.linear(rows, weight), need_x or need_weight)
    dx = dw = x.new_empty(0)
    if need_x:
        dx = d_logits.mm(weight).view(x.shape)
    if need_weight:
        dw = d_logits.t().mm(rows)
    return loss / wanted.count, dx, dw


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty((), dtype=accumulate(x.dtype)),
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def chunked(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in blocks of rows. Beyond its results it holds one block of logits, and where weight
    is of a half type the float32 sum of dw."""
    dtype = accumulate(x.dtype)
    dw = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype)

    def add_to_dw(d_logits: torch.Tensor, rows: torch.Tensor) -> None:
        dw.addmm_(d_logits.t(), rows.to(dtype))

    V = weight.shape[0]
    loss, dx = in_blocks(
        x,
        V,
        Wanted.of(NAME, x, V, targets, ignore_index, mean),
        lambda rows: LINEAR.run(rows, weight),
        (lambda d_logits: BACKWARD_X.run(d_logits, weight)) if need_x else None,
        add_to_dw if need_weight else None,
    )
    return loss, dx, dw.to(weight.dtype)


def save(inputs: tuple, output: tuple) -> tuple:
    x, weight, targets, ignore_index, need_x, need_weight, mean = inputs
    return (x, weight, targets), (ignore_index, mean, {(need_x, need_weight): output[1:]})


def gradient(
    saved: tuple, rest: tuple, needed: tuple, grad: torch.Tensor, *unused: torch.Tensor
) -> tuple:
    ignore_index, mean, made = rest
    # Taken out, so that no copy of dw is held on while autograd adds it to weight.grad. A second
    # pass through the same graph makes them again.
    dx, dw = made.pop(needed[:2], None) or OP(*saved, ignore_index, *needed[:2], mean)[1:]
    scale = torch.mul if interposed() else torch.Tensor.mul_  # a traced graph must not write them
    return scale(dx, grad), scale(dw, grad), None, None, None, None, None


def cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> Cost:
    products = 1 + need_x + need_weight
    elements = x.numel() * (1 + need_x) + weight.numel() * (1 + need_weight)
    return Cost(
        bytes=elements * x.element_size() + targets.nbytes,
        flops=2 * products * targets.numel() * weight.numel(),
    )


def cases() -> list[Case]:
    def sizes(*rows: int, C: int, V: int, ignored: float = 0.0, scale: float = 1.0, mean=True):
        def make(g, dtype, device):
            targets = randint(g, V, *rows)
            targets[rand(g, *rows) < ignored] = -100
            return (
                randn(g, *rows, C, dtype=dtype, device=device, scale=scale),
                randn(g, V, C, dtype=dtype, device=device, scale=C**-0.5),
                targets.to(device),
                -100,
                True,
                True,
                mean,
            )

        return make

    def strided(g, dtype, device):
        x, *rest = sizes(3, 5, C=40, V=70)(g, dtype, device)
        return torch.cat((x, x), -1)[..., 11:51], *rest

    def not_needed(g, dtype, device):
        return *sizes(7, C=32, V=50)(g, dtype, device)[:3], -100, False, False, True

    return [
        Case("one row", sizes(1, C=8, V=2)),
        Case("odd", sizes(3, 5, C=33, V=65)),
        Case("some ignored", sizes(2, 20, C=64, V=129, ignored=0.4)),
        Case("all ignored", sizes(4, C=16, V=32, ignored=1.0)),
        Case("sum", sizes(3, 7, C=24, V=50, ignored=0.3, mean=False)),
        Case("sum of nothing", sizes(4, C=16, V=32, ignored=1.0, mean=False)),
        Case("two blocks", sizes(ROWS + 9, C=16, V=LOGITS // ROWS)),
        Case("sure of it", sizes(20, C=64, V=100, scale=30.0)),
        Case("strided", strided),
        Case("loss alone", not_needed),
        Case("no rows", sizes(0, C=16, V=32)),
    ]


OP = Op(
    name=NAME,
    schema="(Tensor x, Tensor weight, Tensor targets, int ignore_index=-100, bool need_x=False, "
    "bool need_weight=False, bool mean=True) -> (Tensor, Tensor, Tensor)",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    auxiliary=2,
    cost=cost,
    cases=cases,
)
