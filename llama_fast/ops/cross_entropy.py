"""Cross entropy of a linear head, without ever holding its logits.

    logits = linear(x, weight)
    loss = mean over the kept rows of  log Σ_v exp(logits[v]) - logits[target]

A row is kept when its target is not `ignore_index`. With the reduction "sum" the loss is the sum
over these rows, and n below is 1; with "none" each row has its own, 0 where it is ignored.

Shapes    x (..., C), weight (V, C), targets (...) int64 → loss (), or (...) with "none", float32
          (float64 for float64); a quantised weight is that of `linear` with C_out = V
Layout    x is contiguous in C, its other dims have any stride; weight and targets are contiguous
Rounding  logits are rounded to x's dtype, as the model's own head does, and so are their gradients;
          all else is in float32

Gradient, with P = softmax(logits) and Y the one-hot targets, over the n kept rows:
    dx = (P - Y) W / n        dw = (P - Y)ᵀ x / n
Both are made together with the loss, since P is at hand then: three matrix products in all, where a
backward pass that remakes the logits costs four. So the op returns (loss, dx, dw); a gradient that
nobody needs is an empty tensor and is not computed. A quantised weight is frozen, and its
definition, too, takes a block of rows at a time: on no device are its logits ever whole.

Losses of rows are told apart ("none") for the sake of gradients g of their own, which the forward
pass does not know. Their backward pass therefore runs the op once more, of a sum in which row i
weighs g_i (`row_weights`): dx = g (P - Y) W, dw = (g (P - Y))ᵀ x. That makes four products in all.

A kernel on the CPU multiplies only the rows that are kept: prompts, padding and the borders of
packed documents cost nothing. On a GPU all are multiplied: how many are kept is known there alone,
to ask would be to wait, and what is captured or compiled has shapes that do not change.

The loss's own gradient, which may be a loss scale, comes later. What it would have kept from being
too small for float16 must not be lost before: dx and dw of float16 are float32 until then, and each
row of the logits' gradients is rounded relative to its own size.

Without a kept row the mean is NaN, as `torch.nn.functional.cross_entropy` has it (there is nothing
to take a mean of), the sum is 0, and the gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..config.quantization import NAMED
from ..dispatch import Case, Cost, Op, Sharding, needs_dispatcher, refuse_strict
from ..errors import ShapeError
from . import checks
from .inputs import rand, randint, randn
from .linear import BACKWARD_X, wrong_width
from .linear import OP as LINEAR
from .logits import (
    LOGITS,
    ROWS,
    Wanted,
    blocks,
    check_reduction,
    check_targets,
    gradient_dtype,
    in_blocks,
    rounded,
    undone,
)
from .model_inputs import ModelInputs
from .quantized_weight import QuantizedWeight
from .rms_norm import accumulate

NAME = "linear_cross_entropy"
NOT_QUANTIZED = (None, None, 0, 0, 0)  # what follows `row_weights`


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of `linear(x, weight)` against `targets`: its mean, its sum, or each row's.

    x             (..., C), float32, bfloat16 or float16, contiguous in C
    weight        (V, C), contiguous, of x's dtype and device; or a QuantizedWeight
    targets       (...), int64, each in [0, V) or equal to ignore_index
    ignore_index  marks the rows that do not count
    reduction     "mean" over the rows that count, their "sum", or "none": a loss for each row
    Returns the loss, a float32 scalar; when every row is ignored, a mean of NaN or a sum of 0. With
    "none" the losses of the rows (...), float32, 0 of ignored ones: over a sequence they add up to
    its negative log-likelihood. Raises ShapeError when the arguments do not fit, for another
    reduction, and on the CPU when a target is out of range.
    """
    check_reduction(NAME, reduction)
    now = torch.is_grad_enabled() and reduction != "none"  # else in the backward pass
    need_x = now and x.requires_grad
    if not isinstance(weight, QuantizedWeight):
        need_weight = now and weight.requires_grad
        return OP(x, weight, targets, ignore_index, need_x, need_weight, reduction)[0]
    if x.shape[-1:] != weight.shape[1:]:
        raise wrong_width(NAME, x, weight)
    values, *form = weight.arguments
    return OP(x, values, targets, ignore_index, need_x, False, reduction, None, *form)[0]


def check(
    x, weight, targets, ignore_index, need_x, need_weight, reduction="mean", row_weights=None,
    scales=None, minima=None, V=0, bits=0, group_size=0,
) -> None:  # fmt: skip
    LINEAR.check(x, weight, scales, minima, V, bits, group_size, op=NAME)
    check_targets(NAME, x, targets)
    check_reduction(NAME, reduction)
    if reduction == "none" and (need_x or need_weight):
        raise ShapeError(
            f"{NAME}: need_x or need_weight is True with the reduction 'none', whose gradients the "
            "backward pass makes: both must be False"
        )
    if row_weights is not None:
        if reduction != "sum":
            raise ShapeError(
                f"{NAME}: row_weights are given with the reduction {reduction!r}; it must be 'sum'"
            )
        checks.shape(NAME, "row_weights", row_weights, targets.shape, "the shape of targets")
        dtype = accumulate(x.dtype)
        if row_weights.dtype is not dtype or row_weights.device != x.device:
            raise ShapeError(
                f"{NAME}: row_weights is {checks.describe(row_weights)}; it must be {dtype} on "
                f"{x.device}"
            )


def eager(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    need_x: bool = False,
    need_weight: bool = False,
    reduction: str = "mean",
    row_weights: Tensor | None = None,
    scales: Tensor | None = None,
    minima: Tensor | None = None,
    V: int = 0,
    bits: int = 0,
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    quantized = scales is not None
    N, C = targets.numel(), x.shape[-1]
    V = V if quantized else weight.shape[0]
    wanted = Wanted.of(NAME, x, V, targets, ignore_index, reduction, row_weights)
    rows = x.reshape(N, C)
    # Zeros, and to autograd a function of x. Made beforehand: small results between large
    # temporaries would keep the memory of all of them.
    losses = rows[:0].sum(dtype=accumulate(x.dtype)).expand(N, 1).clone()
    dtype = gradient_dtype(x.dtype)
    dx, dw = x.new_empty((N, C) if need_x else 0, dtype=dtype), x.new_empty(0, dtype=dtype)
    for block in blocks(N, V, quantized) if quantized else [slice(None)]:
        logits = LINEAR.eager(rows[block], weight, scales, minima, V, bits, group_size)
        some, d_logits = wanted.of_rows(block).losses(logits, need_x or need_weight)
        if quantized:
            losses[block] = some
        else:
            losses = some
        if d_logits is not None:
            d_logits, up = rounded(d_logits, x.dtype)
        if need_x:
            form = (scales, minima, C, bits, group_size)
            dx[block] = undone(BACKWARD_X.eager(d_logits, weight, *form), up)
        if need_weight:
            dw = undone(d_logits, up).t().mm(rows.to(dtype))
    loss = wanted.reduced(losses, reduction, targets.shape)
    return loss, dx.view(x.shape) if need_x else dx, dw


def fake(
    x, weight, targets, ignore_index, need_x, need_weight, reduction="mean", *others
) -> tuple[Tensor, Tensor, Tensor]:
    shape = targets.shape if reduction == "none" else ()
    return (
        x.new_empty(shape, dtype=accumulate(x.dtype)),
        x.new_empty(x.shape if need_x else 0, dtype=gradient_dtype(x.dtype)),
        x.new_empty(weight.shape if need_weight else 0, dtype=gradient_dtype(x.dtype)),
    )


def chunked(
    x, weight, targets, ignore_index, need_x, need_weight, reduction="mean", row_weights=None,
    scales=None, minima=None, V=0, bits=0, group_size=0, *, linear=None, linear_backward_x=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in blocks of rows, on the CPU of those alone that are kept. Beyond its results it
    holds one block of logits, and where weight is of a half type the float32 sum of dw.

    linear, linear_backward_x  what launches these ops; by default whoever serves them
    """
    linear, linear_backward_x = linear or LINEAR.run, linear_backward_x or BACKWARD_X.run
    quantized, dtype = scales is not None, accumulate(x.dtype)
    V = V if quantized else weight.shape[0]
    dw = x.new_zeros(weight.shape if need_weight else 0, dtype=dtype)

    def multiply(rows: Tensor) -> Tensor:
        return linear(rows, weight, scales, minima, V, bits, group_size)

    def backward_x(d_logits: Tensor) -> Tensor:
        form = (scales, minima, x.shape[-1], bits, group_size)
        return linear_backward_x(d_logits, weight, *form)

    def add_to_dw(d_logits: Tensor, rows: Tensor) -> None:
        dw.addmm_(d_logits.t(), rows.to(dtype))

    wanted = Wanted.of(NAME, x, V, targets, ignore_index, reduction, row_weights)
    losses, dx = in_blocks(
        x,
        V,
        wanted,
        multiply,
        backward_x if need_x else None,
        add_to_dw if need_weight else None,
        quantized,
    )
    loss = wanted.reduced(losses, reduction, targets.shape)
    return loss, dx, dw.to(gradient_dtype(x.dtype))


def save(inputs: tuple, output: tuple) -> tuple:
    x, weight, targets, ignore_index, need_x, need_weight, reduction, *others = inputs
    row_weights, scales, minima, *form = others
    made = {(need_x, need_weight): list(output[1:])}
    tensors = (x, weight, targets, row_weights, scales, minima)
    return tensors, (ignore_index, reduction, form, made)


def gradient(
    saved: tuple, scalars: tuple, needed: tuple, grad: Tensor, *unused: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, targets, row_weights, scales, minima = saved
    ignore_index, reduction, form, made = scalars
    if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
        return *differentiable(saved, scalars, needed, grad), *[None] * 11
    given = (x, weight, targets, ignore_index, *needed[:2])
    if reduction == "none":
        weighed = OP(*given, "sum", grad.contiguous(), scales, minima, *form)[1:]
        return *_as_x(x, needed, weighed), *[None] * 11
    # Taken out, so that no copy of dw is held on while autograd adds it to weight.grad. A second
    # pass through the same graph makes them again.
    gradients = made.pop(needed[:2], None)
    if gradients is None:
        gradients = list(OP(*given, reduction, row_weights, scales, minima, *form)[1:])
    return *_as_x(x, needed, _scaled(gradients, grad)), *[None] * 11


def _scaled(gradients: list[Tensor], grad: Tensor) -> Iterator[Tensor]:
    """The gradients times the loss's own. The list lets go of each, so that of float16 the float32
    dx is gone before dw exists twice."""
    scale = torch.mul if needs_dispatcher() else torch.Tensor.mul_  # a traced graph writes nothing
    while gradients:
        d = gradients.pop(0)
        yield scale(d, grad) if d.numel() else d


def _as_x(x: Tensor, needed: tuple, gradients: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """(dx, dw) in x's dtype, those that are needed."""
    return (d.to(x.dtype) if need else None for d, need in zip(gradients, needed, strict=False))


def differentiable(
    saved: tuple, scalars: tuple, needed: tuple, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) as functions of x, weight and grad, for a second gradient. The logits are whole."""
    x, weight, targets, row_weights, scales, minima = saved
    ignore_index, reduction, form, _ = scalars
    refuse_strict(OP, "where its gradient is to be differentiated again (create_graph=True)")
    rows = x.reshape(targets.numel(), x.shape[-1])
    logits = LINEAR(rows, weight, scales, minima, *form)
    V = logits.shape[-1]
    compared = Wanted.of(NAME, x, V, targets, ignore_index, reduction, row_weights)
    compared = compared._replace(count=compared.count.clamp(min=1))
    loss = compared.reduced(compared.losses(logits, False)[0], reduction, targets.shape)
    wanted = [t for t, need in zip((x, weight), needed, strict=False) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed[:2])


def cost(
    x, weight, targets, ignore_index, need_x, need_weight, reduction="mean", row_weights=None,
    scales=None, minima=None, V=0, bits=0, group_size=0,
) -> Cost:  # fmt: skip
    head = sum(part.nbytes for part in (weight, scales, minima) if part is not None)
    V = weight.shape[0] if scales is None else V
    products = 1 + need_x + need_weight
    return Cost(
        bytes=x.nbytes * (1 + need_x) + head * (1 + need_weight) + targets.nbytes,
        flops=2 * products * x.numel() * V,
    )


def sharding(
    x, weight, targets, ignore_index, need_x, need_weight, reduction, row_weights, scales, *form
) -> Sharding:
    """By rows; their mean is over the targets of all ranks, which a rank does not know."""
    loss = "..." if reduction == "none" else "*"
    dx, dw = "...C" if need_x else "-", "VC" if need_weight else "-"
    weight = "VC" if scales is None else "-"
    dims = f"...C, {weight}, ..., ..., -, - -> {loss}, {dx}, {dw}"
    return Sharding(dims, "" if reduction == "mean" else "...")


def variant(
    x, weight, targets, ignore_index, need_x, need_weight, reduction="mean", row_weights=None,
    scales=None, minima=None, V=0, bits=0, group_size=0,
) -> str:  # fmt: skip
    kind = "per row" if reduction == "none" else "weighted" if row_weights is not None else ""
    return f"{kind} {f'int{bits}' if bits else ''}".strip()


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    N, C = m.work.batch * m.work.tokens, m.config.dim
    flags = (-100, m.gradient)

    def make() -> tuple:
        given = m.randn(N, C), m.weight("head"), m.targets(N)
        return *given, *flags, m.gradient, "mean", None, *NOT_QUANTIZED

    def make_int8() -> tuple:
        form = NAMED["int8"].head  # in "int4" too
        x = m.rows(C)
        values, *others = m.quantized_weight("head", form.bits, form.group_size)
        return x, values, m.targets(*x.shape[:-1]), *flags, False, "mean", None, *others

    return {NAME: make, f"{NAME} int8": make_int8}


def cases() -> list[Case]:
    return [*float_cases(), *quantized_cases()]


def float_cases() -> list[Case]:
    def sizes(
        *rows: int,
        C: int,
        V: int,
        ignored: float = 0.0,
        scale: float = 1.0,
        reduction: str = "mean",
        weighted: bool = False,
    ):
        def make(g, dtype, device):
            targets = randint(g, V, *rows)
            targets[rand(g, *rows) < ignored] = -100
            weights = rand(g, *rows).to(device, accumulate(dtype)) if weighted else None
            return (
                randn(g, *rows, C, dtype=dtype, device=device, scale=scale),
                randn(g, V, C, dtype=dtype, device=device, scale=C**-0.5),
                targets.to(device),
                -100,
                reduction != "none",
                reduction != "none",
                reduction,
                weights,
                *NOT_QUANTIZED,
            )

        return make

    def strided(g, dtype, device):
        x, *rest = sizes(3, 5, C=40, V=70)(g, dtype, device)
        return torch.cat((x, x), -1)[..., 11:51], *rest

    def not_needed(g, dtype, device):
        given = sizes(7, C=32, V=50)(g, dtype, device)[:3]
        return *given, -100, False, False, "mean", None, *NOT_QUANTIZED

    return [
        Case("one row", sizes(1, C=8, V=2)),
        Case("odd", sizes(3, 5, C=33, V=65)),
        Case("some ignored", sizes(2, 20, C=64, V=129, ignored=0.4)),
        Case("all ignored", sizes(4, C=16, V=32, ignored=1.0)),
        Case("sum", sizes(3, 7, C=24, V=50, ignored=0.3, reduction="sum")),
        Case("sum of nothing", sizes(4, C=16, V=32, ignored=1.0, reduction="sum")),
        Case("per row", sizes(3, 7, C=24, V=50, ignored=0.3, reduction="none")),
        Case("per row, all ignored", sizes(4, C=16, V=32, ignored=1.0, reduction="none")),
        Case("per row, no rows", sizes(0, C=16, V=32, reduction="none")),
        Case("weighted", sizes(3, 7, C=24, V=50, ignored=0.3, reduction="sum", weighted=True)),
        Case("two blocks", sizes(ROWS + 9, C=16, V=LOGITS // ROWS)),
        Case("sure of it", sizes(20, C=64, V=100, scale=30.0)),
        Case("strided", strided),
        Case("loss alone", not_needed),
        Case("no rows", sizes(0, C=16, V=32)),
    ]


def quantized_cases() -> list[Case]:
    def sizes(*rows: int, C: int, V: int, bits: int = 8, group_size: int = 32,
              symmetric: bool = True, ignored: float = 0.0, need_x: bool = True,
              reduction: str = "mean", take=lambda x: x):  # fmt: skip
        def make(g, dtype, device):
            x = take(randn(g, *rows, C, dtype=dtype, device=device))
            C_in = x.shape[-1]
            w = randn(g, V, C_in, dtype=torch.float32, device=device, scale=C_in**-0.5)
            weight = QuantizedWeight.from_float(w, bits, group_size, symmetric)
            values, *others = weight.arguments
            targets = randint(g, V, *x.shape[:-1])
            targets[rand(g, *targets.shape) < ignored] = -100
            form = (None, *others)
            return x, values, targets.to(device), -100, need_x, False, reduction, *form

        return make

    kinds = [
        Case(
            f"{bits} bits, {'symmetric' if symmetric else 'with minima'}",
            sizes(3, 8, C=75, V=150, bits=bits, group_size=group_size, symmetric=symmetric),
        )
        for bits, group_size in ((8, 64), (4, 32))
        for symmetric in (True, False)
    ]
    return [
        *kinds,
        Case("quantised, one row", sizes(1, C=8, V=2)),
        Case("quantised, some ignored", sizes(2, 20, C=64, V=129, ignored=0.4)),
        Case("quantised, all ignored", sizes(4, C=16, V=32, bits=4, ignored=1.0)),
        Case("quantised, sum", sizes(3, 7, C=24, V=50, ignored=0.3, reduction="sum")),
        Case(
            "quantised, per row",
            sizes(3, 7, C=24, V=50, ignored=0.3, need_x=False, reduction="none"),
        ),
        Case("quantised, loss alone", sizes(7, C=32, V=50, need_x=False)),
        Case("quantised, no rows", sizes(0, C=16, V=32)),
        Case(
            "quantised, columns of a wider tensor",
            sizes(3, 5, C=80, V=70, bits=4, take=lambda x: x[..., 11:51]),
        ),
    ]


OP = Op(
    name=NAME,
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("row_weights", "scales", "minima"),
    non_differentiable=2,
    gradient_in_forward=True,
    sharding=sharding,
    cost=cost,
    cases=cases,
    variant=variant,
    at_model_size=at_model_size,
)
