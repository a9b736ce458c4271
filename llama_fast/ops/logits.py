"""The cross entropy of logits that a head makes, of all rows or of a block of them at a time.

The op `linear_cross_entropy` says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..dispatch.torch_private import is_transformed
from ..errors import ShapeError
from . import checks
from .rms_norm import accumulate

# Rows of logits that exist at a time: 2²² logits (16 MB, what a last-level cache holds), and for
# large vocabularies still enough rows for the matrix products to be worth their passes over weight.
LOGITS, ROWS = 1 << 22, 128
# Times as many rows of a quantised weight, which every block dequantises once for dx.
QUANTIZED = 2


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"{op}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")


def check_targets(op: str, x: torch.Tensor, targets: torch.Tensor) -> None:
    checks.shape(op, "targets", targets, x.shape[:-1], "(...)")
    if targets.dtype is not torch.int64:
        raise ShapeError(
            f"{op}: targets is {targets.dtype}; it must be torch.int64: convert it with .long()"
        )
    if targets.device != x.device:
        raise ShapeError(
            f"{op}: targets is on {targets.device} and x on {x.device}; "
            f"move it with .to({str(x.device)!r})"
        )


def check_range(op: str, targets: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raises ShapeError for a target that is no row of the weight. Reads the values, so only on the
    CPU: a GPU would have to be waited for, and a torch.func transform may hide them."""
    if targets.is_cpu and not is_transformed(targets):
        wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise ShapeError(
                f"{op}: targets{at} is {targets[tuple(at)]}; it must be in "
                f"[0, {V}), the rows of weight, or ignore_index = {ignore_index}"
            )


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of x's dtype wait for the loss's own, which may be a loss scale:
    without it many of them are too small for float16, but for no other."""
    return torch.float32 if dtype is torch.float16 else dtype


def rounded(d_logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of logits (N, V) rounded to x's dtype, for a matrix product, and what the product
    is to be divided by, or None. To fill the range of float16, each row is multiplied by a power of
    two: its largest number is then 32 to 64, so that the row's sum of products with numbers up to
    500 stays in the range too."""
    if dtype is not torch.float16:
        return d_logits.to(dtype), None
    largest = torch.linalg.vector_norm(d_logits, float("inf"), dim=-1, keepdim=True)
    _, exponent = torch.frexp(largest)
    up = torch.ldexp(torch.ones_like(largest), 6 - exponent.clamp(min=-100))
    return (d_logits * up).to(dtype), up


def undone(product: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """The product of `rounded` gradients as it would be of the gradients themselves."""
    return product if up is None else product / up


class Wanted(NamedTuple):
    """What the logits of N rows are compared with.

    target  (N, 1) int64: a column for each row, any where it does not count
    kept    (N, 1) bool: whether it counts
    share   (N, 1): what its loss counts for: 0 where it is ignored; else its weight, or 1, and of a
            mean one over the number of the kept rows
    count   (): what the sum of the losses is to be divided by, 0 for the mean of no rows
    """

    target: torch.Tensor
    kept: torch.Tensor
    share: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(
        cls,
        op: str,
        x: torch.Tensor,
        V: int,
        targets: torch.Tensor,
        ignore_index: int,
        reduction: str,
        row_weights: torch.Tensor | None = None,
    ) -> Wanted:
        check_range(op, targets, V, ignore_index)
        flat = targets.reshape(-1, 1)
        kept = flat != ignore_index
        count = kept.sum() if reduction == "mean" else torch.ones_like(kept.sum())
        share = kept.to(accumulate(x.dtype)) / count.clamp(min=1)
        if row_weights is not None:
            share = row_weights.reshape(-1, 1).to(share.dtype).where(kept, 0.0)
        return cls(flat.where(kept, 0), kept, share, count)

    def of_rows(self, rows: slice | torch.Tensor) -> Wanted:
        return Wanted(self.target[rows], self.kept[rows], self.share[rows], self.count)

    def kept_rows(self) -> torch.Tensor | None:
        """Indices, ascending, of the rows that count. None where all do, and on a GPU, where to ask
        how many they are would be to wait, and a captured graph has shapes that do not change."""
        if not self.kept.is_cpu:
            return None
        rows = self.kept.view(-1).nonzero().view(-1)
        return None if len(rows) == len(self.kept) else rows

    def losses(
        self, logits: torch.Tensor, need_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the losses (N, 1) of logits (N, V), 0 of ignored rows, and the gradient of what
        they are together by their shares; both in float32 (or 64)."""
        log_p = logits.to(self.share.dtype).log_softmax(-1)
        losses = -log_p.gather(1, self.target).where(self.kept, 0.0)
        if not need_gradient:
            return losses, None
        p = log_p.exp()
        d_logits = p.scatter_add(1, self.target, p.new_full(self.target.shape, -1.0))
        return losses, d_logits * self.share

    def reduced(self, losses: torch.Tensor, reduction: str, shape: torch.Size) -> torch.Tensor:
        """The losses (N, 1) of all rows, 0 of ignored ones, as their mean or sum, or with "none" in
        the shape of the targets."""
        if reduction == "none":
            return losses.reshape(shape)
        return losses.sum() / self.count if reduction == "mean" else (losses * self.share).sum()


def blocks(N: int, V: int, quantized: bool = False) -> Iterator[slice]:
    """Of N rows of V logits, as many at a time as may exist. They are of even sizes, since a short
    last one would multiply at a poor rate, and the same whatever the thread count."""
    least = ROWS * QUANTIZED if quantized else ROWS
    count = -(-N // max(least, LOGITS // max(V, 1)))
    return (slice(N * i // count, N * (i + 1) // count) for i in range(count))


def in_blocks(
    x: torch.Tensor,
    V: int,
    wanted: Wanted,
    multiply: Callable[[torch.Tensor], torch.Tensor],
    backward_x: Callable[[torch.Tensor], torch.Tensor] | None,
    backward_weight: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    quantized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses (N, 1), 0 of ignored rows, and dx of x's shape, or empty without `backward_x`; for
    a backend's kernels.

    multiply         rows of x → fresh logits, of x's dtype
    backward_x       their gradient, of x's dtype → that of the rows
    backward_weight  takes their gradient, in the dtype of sums, and the rows
    quantized        whether the weight is
    Only the rows that count are multiplied, where `Wanted.kept_rows` knows them. Beyond its results
    it holds one block of logits.
    """
    rows, kept = x.reshape(len(wanted.target), x.shape[-1]), wanted.kept_rows()
    losses = x.new_zeros((len(rows), 1), dtype=wanted.share.dtype)
    make = x.new_empty if kept is None else x.new_zeros
    dx = make(rows.shape if backward_x else 0, dtype=gradient_dtype(x.dtype))
    for block in blocks(len(rows) if kept is None else len(kept), V, quantized):
        block = block if kept is None else kept[block]
        some, (target, counts, share, _) = rows[block], wanted.of_rows(block)
        # In place from here on: logits - max, then P, then (P - Y) times the row's share.
        logits = multiply(some).to(losses.dtype)
        logits -= logits.amax(-1, keepdim=True)
        at_target = logits.gather(1, target)
        total = logits.exp_().sum(-1, keepdim=True)
        losses[block] = (total.log() - at_target).where(counts, 0.0)
        if backward_x or backward_weight:
            logits.mul_(share / total)
            logits.scatter_add_(1, target, -share)
        if backward_x:
            d_logits, up = rounded(logits, x.dtype)
            dx[block] = undone(backward_x(d_logits), up)
            del d_logits
        if backward_weight:
            backward_weight(logits, some)
        del logits  # its memory is for the next block
    return losses, dx.view(x.shape) if backward_x else dx
