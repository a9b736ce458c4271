"""Rows of some tokens that are trained, in an embedding and in a head that are frozen otherwise.

Legend of dims: C model dim, V vocabulary, n trained rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import QuantizedWeight
from ..utils.shards import whole


class TrainedRows(nn.Module):
    """Rows of some tokens that stand in the place of an embedding's and a head's own.

    ids (n,) int64; values (n, C), by default a copy of the weight's own rows.
    """

    def __init__(
        self,
        ids: Sequence[int],
        weight: nn.Parameter | QuantizedWeight,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        ids = torch.tensor(ids, dtype=torch.int64, device=weight.device)
        place = torch.full((weight.shape[0],), -1, device=weight.device)
        place[ids] = torch.arange(len(ids), device=weight.device)
        quantized = isinstance(weight, QuantizedWeight)
        values = weight.rows(ids) if quantized else whole(weight.detach())[ids]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("place", place, persistent=False)  # of each token among ids, or -1
        self.values = nn.Parameter(values.to(dtype, copy=True))

    def look_up(self, tokens: Tensor, x: Tensor) -> Tensor:
        """x (…, C), the embedding of tokens (…), with the rows of `ids` put in."""
        place = self.place[tokens]
        found = nn.functional.embedding(place.clamp(min=0), self.values).to(x.dtype)
        return torch.where((place >= 0).unsqueeze(-1), found, x)

    def into_logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """logits (…, V) of x (…, C), with those of `ids` put in."""
        own = ops.linear(x, self.values.to(x.dtype))
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


def rows_cross_entropy(
    x: Tensor,
    weight: nn.Parameter | QuantizedWeight,
    rows: TrainedRows,
    targets: Tensor,
    *,
    ignore_index: int,
    reduction: str,
    padding: int = 0,
) -> Tensor:
    """Cross entropy of a head some rows of which are trained, without the last `padding` rows.

    Of the head's gradient (P - Y)ᵀ x only those rows are made: a matrix of their size, not of V.
    It is carried by a term whose value is zero.
    """
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    values = rows.values.to(x.dtype)
    whole = weight.detach().index_copy(0, rows.ids, values.detach())
    whole = whole[:-padding] if padding else whole
    losses = ops.linear_cross_entropy(
        x, whole, targets, ignore_index=ignore_index, reduction="none"
    )
    kept = targets != ignore_index
    if torch.is_grad_enabled() and rows.values.requires_grad:
        x = x.detach()
        logits = ops.linear(x, values)  # (…, n)
        with torch.no_grad():
            of_target = (whole[targets.clamp(min=0)].float() * x.float()).sum(-1)
            logsumexp = losses.detach() + of_target.to(x.dtype).float()
            slope = (logits.float() - logsumexp.unsqueeze(-1)).exp()
            slope = slope - (rows.ids == targets.unsqueeze(-1)).float()
            slope = torch.where(kept.unsqueeze(-1), slope, 0.0)
        carrier = (slope * logits.float()).sum(-1)
        losses = losses + (carrier - carrier.detach())
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / kept.sum() if reduction == "mean" else total
