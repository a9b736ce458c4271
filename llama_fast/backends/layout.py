"""What the backends of compiled code say of tensors: their dtypes, and rows in memory."""

from __future__ import annotations

import torch

# As the kernels number them, in csrc/cpu/kernels.h and csrc/cuda/kernels.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def reasons(dtype: torch.dtype, **tensors: torch.Tensor) -> list[str]:
    """Why a kernel cannot take these: a dtype it has not, or elements apart in the last dim."""
    found = [] if dtype in DTYPES else [f"{dtype} is not one of float32, bfloat16, float16"]
    for name, x in tensors.items():
        if x.stride()[-1] != 1 and x.shape[-1] > 1 and x.numel():
            found.append(f"{name} has stride {x.stride(-1)} in its last dim; it must be 1")
    return found


def rows_reasons(**tensors: torch.Tensor) -> list[str]:
    """Why tensors do not fit into Rows: those have at most three outer dims."""
    found = []
    for name, x in tensors.items():
        if x.dtype not in DTYPES or not x.is_contiguous():
            found += reasons(x.dtype, **{name: x})
            if x.ndim > 4 and not x.is_contiguous():
                found.append(f"{name} has {x.ndim} dims and is not contiguous; at most 4 then")
    return found


def rows(x: torch.Tensor) -> tuple[int, ...]:
    """The Rows of the kernels' headers: three outer sizes, then their strides."""
    if x.is_contiguous():
        C = x.shape[-1]
        return (1, 1, x.numel() // C if C else 0, 0, 0, C)
    padding = (1,) * (4 - x.ndim)
    return padding + x.shape[:-1] + padding + x.stride()[:-1]
