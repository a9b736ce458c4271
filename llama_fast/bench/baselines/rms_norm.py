"""Who has `rms_norm` in one function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

OP = "rms_norm"


def of_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def of_liger(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def of_flashinfer(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    import flashinfer

    return flashinfer.norm.rmsnorm(x.flatten(0, -2), weight, eps).view(x.shape)


BASELINES = {"torch": of_torch, "liger-kernel": of_liger, "flashinfer": of_flashinfer}
