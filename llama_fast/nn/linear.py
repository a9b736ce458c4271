"""Modules whose weight is a matrix of floats or of quantised values: linear, gate/up, embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import QuantizedWeight


class _Weighted(nn.Module):
    """A module whose `weight` is a Parameter, or a QuantizedWeight assigned in its place."""

    weight: nn.Parameter | QuantizedWeight

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, QuantizedWeight):
            self._parameters.pop(name, None)  # torch would refuse a module in its place
        super().__setattr__(name, value)


class Linear(_Weighted):
    """y = x Wᵀ, without bias: x (..., in_features) → (..., out_features)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)

    def cross_entropy(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        padding: int = 0,
    ) -> Tensor:
        """Cross entropy of `targets` (...) int64, as a head: the logits x Wᵀ are never stored
        whole. padding: how many rows at the weight's end are no token's; they take no part, and
        get no gradient."""
        settings = {"ignore_index": ignore_index, "reduction": reduction}
        if padding and isinstance(self.weight, QuantizedWeight):
            # Its values are packed by blocks of rows, and cannot be cut: the logits are whole here.
            logits = self(x)[..., :-padding].float().flatten(0, -2)
            loss = nn.functional.cross_entropy(logits, targets.flatten(), **settings)
            return loss.view(targets.shape) if reduction == "none" else loss
        weight = self.weight[:-padding] if padding else self.weight
        return ops.linear_cross_entropy(x, weight, targets, **settings)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class GateUp(Linear):
    """silu(x W_gateᵀ) · (x W_upᵀ): x (..., in_features) → (..., out_features / 2). The weight's
    first half are the rows of the gate, its second those of `up`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, epilogue="swiglu")


class Embedding(_Weighted):
    """A row of the weight for each token: tokens (...) int64 → (..., embedding_dim), of the
    weight's dtype; float32 where it is quantised."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.rows(tokens)
        return nn.functional.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
