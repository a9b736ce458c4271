"""When an op may stand in for what a module does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(*tensors: Tensor) -> bool:
    """Whether an op may be given these: no tensor subclasses, one dtype that kernels have."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.dtype is not dtype:
            return False
    return True


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_learnt(number: float | Tensor) -> bool:
    """Whether a gradient is to reach it: ops take numbers for constants."""
    return isinstance(number, Tensor) and needs_gradient(number)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
