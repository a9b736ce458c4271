"""`linear_cross_entropy` with a weight of 8-bit or 4-bit integers.

    logits = linear_quantized(x, …)     loss = mean over the kept rows of
                                               log Σ_v exp(logits[v]) - logits[target]

Shapes    x (..., C), targets (...) int64 → loss (), float32 (float64 for float64); the weight is
          that of `linear_quantized` with C_out = V
Layout    that of `linear_quantized`; targets are contiguous
Rounding  that of `linear_quantized`, then that of `linear_cross_entropy`

Gradient, with P = softmax(logits) and Y the one-hot targets, over the n kept rows:
    dx = (P - Y) W / n
The weight is frozen. As in `linear_cross_entropy` dx is made together with the loss, and what that
says of ignored rows, of sums and of no kept row holds here. The definition, too, takes a block of
rows at a time: on no device are the logits ever whole.
"""

from __future__ import annotations

import torch

from ..dispatch import Case, Cost, Op, interposed
from .inputs import rand, randint, randn
from .linear_quantized import BACKWARD_X
from .linear_quantized import OP as LINEAR
from .logits import Wanted, blocks, check_reduction, check_targets
from .quantized_weight import QuantizedWeight
from .rms_norm import accumulate

NAME = "linear_cross_entropy_quantized"


def linear_cross_entropy_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    V: int,
    bits: int,
    group_size: int,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean or summed cross entropy of `linear_quantized(x, …)` against `targets`.

    `llama_fast.linear_cross_entropy(x, weight, targets)` calls this for a QuantizedWeight, which
    holds the arguments; they are those of `linear_quantized`.

    V             rows of the weight
    targets       (...), int64, each in [0, V) or equal to ignore_index
    ignore_index  marks the rows that do not count
    reduction     "mean" over the rows that count, or their "sum"
    Returns the loss, a float32 scalar; when every row is ignored, a mean of NaN or a sum of 0.
    Raises ShapeError as `linear_cross_entropy` does.
    """
    check_reduction(NAME, reduction)
    need_x = torch.is_grad_enabled() and x.requires_grad
    weight = codes, scales, offsets, V, bits, group_size
    return OP(x, *weight, targets, ignore_index, need_x, reduction == "mean")[0]


def check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    V: int,
    bits: int,
    group_size: int,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    mean: bool = True,
) -> None:
    LINEAR.check(x, codes, scales, offsets, V, bits, group_size, NAME)
    check_targets(NAME, x, targets)


def eager(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    V: int,
    bits: int,
    group_size: int,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = Wanted.of(NAME, x, V, targets, ignore_index, mean)
    N, C = targets.numel(), x.shape[-1]
    rows = x.reshape(N, C)
    loss = rows[:0].sum(dtype=accumulate(x.dtype))  # 0, and to autograd a function of x
    dx = x.new_empty((N, C) if need_x else 0)
    for block in blocks(N, V, quantized=True):
        logits = LINEAR.eager(rows[block], codes, scales, offsets, V, bits, group_size)
        some, d_logits = wanted.of_rows(block).judge(logits, need_x)
        loss = loss + some
        if need_x:
            dx[block] = BACKWARD_X.eager(d_logits, codes, scales, offsets, C, bits, group_size)
    return loss / wanted.count, dx.view(x.shape) if need_x else dx


def fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    V: int,
    bits: int,
    group_size: int,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((), dtype=accumulate(x.dtype)), x.new_empty(x.shape if need_x else 0)


def save(inputs: tuple, output: tuple) -> tuple:
    *weight, targets, ignore_index, need_x, mean = inputs
    x, codes, scales, offsets, *form = weight
    made = {need_x: output[1]}
    return (x, codes, scales, offsets, targets), (form, ignore_index, mean, made)


def gradient(
    saved: tuple, rest: tuple, needed: tuple, grad: torch.Tensor, *unused: torch.Tensor
) -> tuple:
    *weight, targets = saved
    form, ignore_index, mean, made = rest
    dx = made.pop(True, None)
    if dx is None:  # it was not asked for, or this is a second pass through the same graph
        dx = OP(*weight, *form, targets, ignore_index, True, mean)[1]
    scale = torch.mul if interposed() else torch.Tensor.mul_  # a traced graph must not write it
    return scale(dx, grad), *[None] * 10


def cost(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    V: int,
    bits: int,
    group_size: int,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    mean: bool = True,
) -> Cost:
    weight = codes.nbytes + scales.nbytes + (0 if offsets is None else offsets.nbytes)
    return Cost(
        bytes=weight + x.nbytes * (1 + need_x) + targets.nbytes,
        flops=2 * (1 + need_x) * x.numel() * V,
    )


def cases() -> list[Case]:
    def sizes(*rows: int, C: int, V: int, bits: int = 8, group_size: int = 32,
              symmetric: bool = True, ignored: float = 0.0, need_x: bool = True, mean: bool = True,
              take=lambda x: x):  # fmt: skip
        def make(g, dtype, device):
            x = take(randn(g, *rows, C, dtype=dtype, device=device))
            C_in = x.shape[-1]
            w = randn(g, V, C_in, dtype=torch.float32, device=device, scale=C_in**-0.5)
            weight = QuantizedWeight.from_float(w, bits, group_size, symmetric).arguments
            targets = randint(g, V, *x.shape[:-1])
            targets[rand(g, *targets.shape) < ignored] = -100
            return x, *weight, targets.to(device), -100, need_x, mean

        return make

    kinds = [
        Case(
            f"{bits} bits, {'symmetric' if symmetric else 'with offsets'}",
            sizes(3, 8, C=75, V=150, bits=bits, group_size=group_size, symmetric=symmetric),
        )
        for bits, group_size in ((8, 64), (4, 32))
        for symmetric in (True, False)
    ]
    return [
        *kinds,
        Case("one row", sizes(1, C=8, V=2)),
        Case("some ignored", sizes(2, 20, C=64, V=129, ignored=0.4)),
        Case("all ignored", sizes(4, C=16, V=32, bits=4, ignored=1.0)),
        Case("sum", sizes(3, 7, C=24, V=50, ignored=0.3, mean=False)),
        Case("loss alone", sizes(7, C=32, V=50, need_x=False)),
        Case("no rows", sizes(0, C=16, V=32)),
        Case(
            "columns of a wider tensor",
            sizes(3, 5, C=80, V=70, bits=4, take=lambda x: x[..., 11:51]),
        ),
    ]


OP = Op(
    name=NAME,
    schema="(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, int V, int bits, "
    "int group_size, Tensor targets, int ignore_index=-100, bool need_x=False, bool mean=True) "
    "-> (Tensor, Tensor)",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("scales", "offsets"),
    auxiliary=1,
    cost=cost,
    cases=cases,
)
