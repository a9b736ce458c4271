"""Cross entropy of a linear head: loss = mean over the kept rows of lse(logits) - logits[target].

The logits of a block of rows come from a matrix product. One kernel then reads them twice, the
second time from L2: first for each row's lse = log Σ exp(logit), in one pass with an online
softmax, and then to put the gradient in their place,

    d_logits = (exp(logits - lse) - onehot(target)) · factor

of which two matrix products make the block's share of dx and dw. factor is 0 of an ignored row,
else 1 / n of a mean of n kept rows, 1 of a sum, or the row's weight in it. All rows are multiplied:
only the GPU knows how many are kept. So the logits are never whole, and their gradient takes no
memory at all. Everything but the logits and d_logits is float32; of float16 dx and dw too, and
d_logits fill the range: the largest factor is 2¹⁵ until the products are made. The two terms of
lse, the largest logit m and log Σ exp(logit - m), are subtracted one after the other: the error of
their rounded sum, half a unit in the last place of m, would be one of all weights.

Shapes: x (N, C), weight (V, C), targets (N,) int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen, knob
from .launch import TYPES, launch, next_power_of_2
from .shapes import B, Dims, T, empty


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (R, V) contiguous; d_logits afterwards, where NEED_GRAD
    targets_ptr,  # (R,) int64
    loss_ptr,  # (R,) float32: each row's own, 0 where it is ignored
    factor_ptr,  # (R,) float32: of each row's gradient, such as 1 / n; 0 where it is ignored
    V,
    ignore_index,
    NEED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    kept = tl.where(target == ignore_index, 0.0, 1.0)
    logits_row = logits_ptr + row * V
    column = tl.arange(0, BLOCK_V)
    # A target that is no row of the weight reads nothing, and makes the loss infinite. Every thread
    # reads the logit, and one overwrites it below: the reductions' barriers must lie between.
    known = tl.where((target >= 0) & (target < V), target, 0)
    logit = tl.load(logits_row + known).to(tl.float32)
    logit = tl.where(known == target, logit, float("-inf"))

    top = tl.full((BLOCK_V,), float("-inf"), tl.float32)  # of each column of the block
    total = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, V, BLOCK_V):
        at = begin + column
        x = tl.load(logits_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    largest = tl.max(top, axis=0)
    log_sum = tl.log(tl.sum(total * tl.exp(top - largest), axis=0))
    tl.store(loss_ptr + row, tl.where(kept > 0, largest - logit + log_sum, 0.0))

    if NEED_GRAD:
        share = tl.load(factor_ptr + row)
        for begin in range(0, V, BLOCK_V):
            at = begin + column
            x = tl.load(logits_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
            d = (tl.exp(x - largest - log_sum) - tl.where(at == target, 1.0, 0.0)) * share
            tl.store(logits_row + at, d.to(logits_ptr.dtype.element_ty), mask=at < V)


# A block of rows is a 20th of them, so that its logits are 5 % of all; but enough of them for the
# products to be worth their passes over weight.
PART, LEAST_ROWS = 20, 256
# What gradients of float16 logits, which are at most 1, are multiplied by.
FLOAT16_SCALE = 2.0**15


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Logits of a row at a time, and the warps of its program."""

    block_v: int = knob(512, 32768)
    num_warps: int = knob(1, 32)


def config_for(V: int) -> CrossEntropyConfig:
    """16 logits a thread of 8 warps, for each of which it keeps a largest one and a sum."""
    return CrossEntropyConfig(min(4096, next_power_of_2(V)), num_warps=8)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the op linear_cross_entropy of llama_fast.ops.cross_entropy: (loss, dx, dw). Float16
    gradients of logits fill the range by the heaviest row: of rows that weigh a thousandth of it,
    numbers ten bits larger vanish."""
    (V, C), N = weight.shape, targets.numel()
    rows, flat = x.reshape(N, C), targets.reshape(N).contiguous()
    kept = flat != ignore_index
    n = kept.sum().float()
    half = x.dtype is torch.float16
    relative, unit = kept.float(), torch.ones_like(n)  # the factor of a row is their product
    if reduction == "mean":
        unit = 1 / n.clamp(min=1)
    elif row_weights is not None:
        relative = torch.where(kept, row_weights.reshape(N), 0.0)
        if half and N:
            unit = relative.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            relative = relative / unit
    factor = relative * (FLOAT16_SCALE if half else unit)
    dtype = torch.float32 if half else x.dtype
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = x.new_empty(rows.shape if need_x else 0, dtype=dtype)
    dw = torch.zeros(weight.shape if need_weight else 0, dtype=torch.float32, device=weight.device)
    step = max(LEAST_ROWS, N // PART // 128 * 128)
    config = chosen(
        "cross_entropy", "cross_entropy", chip_of(x), config_for(V), V=V, dtype=TYPES[x.dtype]
    )
    for begin in range(0, N, step):
        block = slice(begin, min(begin + step, N))
        logits = F.linear(rows[block], weight)
        launch(
            cross_entropy_kernel,
            (logits.shape[0],),
            logits,
            flat[block],
            losses[block],
            factor[block],
            V,
            ignore_index,
            NEED_GRAD=need_x or need_weight,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )
        if need_x:
            product(logits, weight, out=dx[block])
        if need_weight:
            # Each block's product is rounded, their sum is not: in all about the error of one.
            dw += product(logits.t(), rows[block])
    if half:
        dx *= unit / FLOAT16_SCALE
        dw *= unit / FLOAT16_SCALE
    if reduction == "none":
        loss = losses.view(targets.shape)
    else:
        loss = losses.sum() / n if reduction == "mean" else (losses * relative).sum() * unit
    return loss, dx.view(x.shape) if need_x else dx, dw.to(dtype)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix product, that of float16 in float32."""
    if a.dtype is not torch.float16:
        return torch.mm(a, b, out=out)
    # CUDA's libraries write float32 themselves; torch has offered it since 2.8.
    if a.is_cuda and torch.version.cuda and hasattr(torch.ops.aten.mm, "dtype"):
        made = torch.mm(a, b, out_dtype=torch.float32)
    else:
        made = torch.mm(a.float(), b.float())
    return made if out is None else out.copy_(made)


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    for dims in models:
        x, head = empty(B, T, dims.C), empty(128256, dims.C)
        targets = empty(B, T, dtype=torch.int64)
        yield "linear_cross_entropy", (x, head, targets, -100, True, True)
