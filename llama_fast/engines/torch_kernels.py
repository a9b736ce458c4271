"""What stands between torch's flash attention operators and the op: when it serves a call, and the
kernel of torch that serves the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import kernels
from ..ops.attention import lse_dtype
from ..ops.attention_checks import head_dim_reasons

# The ops that have a kernel here, with the type of its device.
SERVED = kernels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchKernel:
    """The kernel that an operator had before ours."""

    def __init__(self, operator: str, device: str) -> None:
        self._what = f"{operator} on {device}"
        try:
            self._kernel = torch.library.get_kernel(f"aten::{operator}", device)
        except RuntimeError:  # torch has none
            self._kernel = None

    def __call__(self, keyset: Any, reasons: list[str], *args: Any, **kwargs: Any) -> Any:
        """reasons  why the op does not serve the call"""
        if self._kernel is None:
            raise NotImplementedError(
                f"{self._what}: torch has no kernel, and llama_fast cannot serve this call: "
                f"{'; '.join(reasons)}"
            )
        return self._kernel.call_boxed(keyset, *args, **kwargs)


def unsupported(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    return_debug_mask: bool = False,
) -> list[str]:
    """Why the op cannot serve a call of one of torch's operators; nothing where it can."""
    reasons = head_dim_reasons(query.shape[-1])
    if dropout_p:
        reasons.append(f"dropout_p is {dropout_p}; the op has no dropout")
    if return_debug_mask:
        reasons.append("the weights were asked for (return_debug_mask); the op never has them")
    if (op, query.device.type) not in SERVED:
        reasons.append(f"no kernel of {op} runs on {query.device.type} here")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype is not query.dtype or x.dtype not in DTYPES:
            reasons.append(f"{name} is {x.dtype}; all must be of one dtype, float32 or a half type")
        if x.stride(-1) != 1:
            reasons.append(f"{name} is not contiguous in its last dim")
        if not x.numel():
            reasons.append(f"{name} is empty")
    if key.shape != value.shape:
        reasons.append(f"key is {tuple(key.shape)} and value {tuple(value.shape)}")
    return reasons


def for_backward(logsumexp: Tensor, q: Tensor) -> Tensor:
    """lse (B, H, T) as the op's backward pass reads it. Beside float32 torch keeps it in float32,
    the op in float64: its gradients are then as exact as torch's own."""
    return logsumexp.to(lse_dtype(q.dtype)).contiguous()
