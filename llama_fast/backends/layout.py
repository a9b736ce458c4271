"""How tensors lie in memory, as kernels see them: their dtypes, last dim and rows."""

from __future__ import annotations

import functools

import torch

# Of activations and weights, in csrc/args.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_tuple(x: torch.Tensor) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
    """What csrc/bindings/tensor.h takes from a torch without DLPack's C functions: the address, the
    dtype's DLPack code and bits, shape and strides."""
    return x.data_ptr(), *_dlpack_dtype(x.dtype), tuple(x.shape), x.stride()


@functools.cache
def _dlpack_dtype(dtype: torch.dtype) -> tuple[int, int]:
    if dtype is torch.bfloat16:
        code = 4
    elif dtype.is_floating_point:
        code = 2
    else:
        code = 0 if dtype.is_signed else 1
    return code, 8 * dtype.itemsize


def stride_reasons(**tensors: torch.Tensor) -> list[str]:
    """Why a kernel cannot take these: their elements lie apart in the last dim."""
    return [
        f"{name} has stride {x.stride(-1)} in its last dim; it must be 1"
        for name, x in tensors.items()
        if x.stride()[-1] != 1 and x.shape[-1] > 1 and x.numel()
    ]


def dense(grad: torch.Tensor) -> torch.Tensor:
    """A gradient as kernels can read it: that of a sum, say, has stride 0 in every dim."""
    return grad if grad.stride(-1) == 1 and grad.ndim <= 4 else grad.contiguous()
