"""Who has `linear_cross_entropy` in one function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import OPS

OP = "linear_cross_entropy"


def of_torch(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, *_: Any) -> Tensor:
    loss = F.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index)
    return loss.float()


def of_liger(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, *_: Any) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, None, None, ignore_index)
    return found[0] if isinstance(found, tuple) else found


BASELINES = {"torch": of_torch, "liger-kernel": of_liger}


def written_out(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    reduction: str,
    row_weights: Tensor | None,
    *form: Any,
) -> Tensor:
    """With whole logits, as a user would write it."""
    logits = OPS["linear"].eager(x, weight, *form)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def limits(name: str, *args: Any) -> list[str]:
    if name == "torch" and not hasattr(F, "linear_cross_entropy"):
        return [f"torch {torch.__version__} has no linear_cross_entropy"]
    return []
