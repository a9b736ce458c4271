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

from ..errors import ShapeError
from ..registry import Case, Cost, Op, interposed
from . import checks
from .inputs import randn
from .linear import BACKWARD_X
from .linear import OP as LINEAR
from .linear import check as check_linear
from .quantized_weight import QuantizedWeight
from .rms_norm import accumulate


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean or summed cross entropy of `linear(x, weight)` against `targets`.

    x             (..., C), float32, bfloat16 or float16, contiguous in C
    weight        (V, C), contiguous, of x's dtype and device
    targets       (...), int64, each in [0, V) or equal to ignore_index
    ignore_index  marks the rows that do not count
    reduction     "mean" over the rows that count, or their "sum"
    Returns the loss, a float32 scalar; when every row is ignored, a mean of NaN or a sum of 0.
    Raises ShapeError when the arguments do not fit, for another reduction, and on the CPU when a
    target is out of range.
    """
    if reduction not in ("mean", "sum"):
        raise ShapeError(
            f"linear_cross_entropy: reduction is {reduction!r}; it must be 'mean' or 'sum'"
        )
    if isinstance(weight, QuantizedWeight):
        raise ShapeError(
            "linear_cross_entropy: weight is a QuantizedWeight; give it a float weight, or take "
            "torch.nn.functional.cross_entropy of linear(x, weight).float()"
        )
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
    check_linear(x, weight)
    checks.shape("linear_cross_entropy", "targets", targets, x.shape[:-1], "(...)")
    if targets.dtype is not torch.int64:
        raise ShapeError(
            f"linear_cross_entropy: targets is {targets.dtype}; it must be torch.int64: "
            "convert it with .long()"
        )
    if targets.device != x.device:
        raise ShapeError(
            f"linear_cross_entropy: targets is on {targets.device} and x on {x.device}; "
            f"move it with .to({str(x.device)!r})"
        )


def check_range(targets: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raises ShapeError for a target that is no row of the weight. Reads the values, so only on the
    CPU: a GPU would have to be waited for, and a torch.func transform may hide them."""
    if targets.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(targets):
        wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise ShapeError(
                f"linear_cross_entropy: targets{at} is {targets[tuple(at)]}; it must be in "
                f"[0, {V}), the rows of weight, or ignore_index = {ignore_index}"
            )


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_range(targets, weight.shape[0], ignore_index)
    rows, targets = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    kept = targets != ignore_index
    logits = F.linear(rows, weight).to(accumulate(x.dtype))
    log_p = logits.log_softmax(-1)
    target = targets.where(kept, 0)[:, None]
    loss = -log_p.gather(1, target)[:, 0].where(kept, 0.0).sum()
    n = kept.sum() if mean else 1

    dx = dw = x.new_empty(0)
    if need_x or need_weight:
        p = log_p.exp()
        d_logits = p.scatter_add(1, target, p.new_full(target.shape, -1.0))
        share = kept.to(p.dtype) / (n.clamp(min=1) if mean else 1)
        d_logits = (d_logits * share[:, None]).to(x.dtype)
        if need_x:
            dx = d_logits.mm(weight).view(x.shape)
        if need_weight:
            dw = d_logits.t().mm(rows)
    return loss / n, dx, dw


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


# Rows of logits that exist at a time: 2²² logits (16 MB, what a last-level cache holds), and for
# large vocabularies still enough rows for the matrix products to be worth their passes over weight.
LOGITS, ROWS = 1 << 22, 128


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
    is of a half type the float32 sum of dw. The blocks are the same whatever the thread count."""
    N, V = targets.numel(), weight.shape[0]
    check_range(targets, V, ignore_index)
    rows, targets = x.reshape(N, x.shape[-1]), targets.reshape(-1)
    kept = targets != ignore_index
    count = kept.sum() if mean else torch.ones_like(kept.sum())
    target = targets.where(kept, 0)[:, None]
    loss = x.new_zeros((), dtype=accumulate(x.dtype))
    share = (kept.to(loss.dtype) / count.clamp(min=1))[:, None]
    dx = x.new_empty(rows.shape if need_x else 0)
    dw = weight.new_zeros(weight.shape if need_weight else 0, dtype=loss.dtype)
    blocks = -(-N // max(ROWS, LOGITS // max(V, 1)))
    for i in range(blocks):  # of even sizes: a short last one would multiply at a poor rate
        block = slice(N * i // blocks, N * (i + 1) // blocks)
        # In place from here on: logits - max, then P, then (P - Y) / n.
        logits = LINEAR.run(rows[block], weight).to(loss.dtype)
        logits -= logits.amax(-1, keepdim=True)
        at_target = logits.gather(1, target[block])
        total = logits.exp_().sum(-1, keepdim=True)
        loss += (total.log() - at_target).where(kept[block, None], 0.0).sum()
        if need_x or need_weight:
            logits.mul_(share[block] / total)
            logits.scatter_add_(1, target[block], -share[block])
        if need_x:
            dx[block] = BACKWARD_X.run(logits.to(x.dtype), weight)
        if need_weight:
            dw.addmm_(logits.t(), rows[block].to(dw.dtype))
    return loss / count, dx.view(x.shape) if need_x else dx, dw.to(weight.dtype)


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
            targets = torch.randint(V, rows, generator=g)
            targets[torch.rand(rows, generator=g, dtype=torch.float32) < ignored] = -100
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
    name="linear_cross_entropy",
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
