"""The C++ kernels of `llama_fast._cpu`: a launcher and its limits for each op.

The ops have checked shapes, dtypes and devices before a launcher runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..ops.attention import too_long
from ..ops.cross_entropy import chunked as linear_cross_entropy_in_blocks
from ..registry import OPS, Backend, Implementation, nothing, register_backend

try:
    from .. import _cpu
except ImportError as error:
    _cpu = None
    _unavailable = [
        f"the extension module llama_fast._cpu cannot be imported ({error}); "
        "install the package with a C++ compiler at hand: pip install ."
    ]
else:
    _unavailable = []

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def isas() -> list[str]:
    """The instruction sets that this build and this CPU have, best first."""
    return [] if _cpu is None else _cpu.isas()


def isa() -> str:
    """The instruction set in use."""
    return _cpu.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside the block, the CPU kernels run in instruction set `name`, in every thread."""
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


def _dtype_reasons(x: torch.Tensor) -> list[str]:
    if x.dtype in DTYPES:
        return []
    return [f"{x.dtype} is not one of float32, bfloat16, float16"]


def _rows_reasons(name: str, x: torch.Tensor) -> list[str]:
    """Why `x` is not rows of contiguous elements with at most three outer dims."""
    reasons = _dtype_reasons(x)
    if not x.is_contiguous():
        if x.ndim > 4:
            reasons.append(f"{name} has {x.ndim} dims and is not contiguous; at most 4 then")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            reasons.append(f"{name} has stride {x.stride(-1)} in its last dim; it must be 1")
    return reasons


def _rows(x: torch.Tensor) -> tuple[int, ...]:
    """The Rows of csrc/cpu/kernels.h: three outer sizes, then their strides."""
    if x.is_contiguous():
        C = x.shape[-1]
        return (1, 1, x.numel() // C if C else 0, 0, 0, C)
    padding = (1,) * (4 - x.ndim)
    return padding + tuple(x.shape[:-1]) + padding + x.stride()[:-1]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    _cpu.rms_norm(
        DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), y.data_ptr(), _rows(x), x.shape[-1], eps
    )
    return y


def _rms_norm_unsupported(x: torch.Tensor, weight: torch.Tensor, eps: float) -> list[str]:
    reasons = _rows_reasons("x", x)
    if not weight.is_contiguous():
        reasons.append("weight is not contiguous")
    return reasons


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    o = torch.empty(q.shape, dtype=q.dtype)
    bad_row = _cpu.attention(
        DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        o.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        q.shape,
        k.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        causal,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )
    if bad_row >= 0:
        raise too_long(bad_row, int(lengths[bad_row]), k.shape[1])
    return o


def _attention_unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> list[str]:
    reasons = _dtype_reasons(q)
    D = q.shape[-1]
    if D % 8 or D > 256:
        reasons.append(f"D is {D}; it must be a multiple of 8 up to 256")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and D > 1:
            reasons.append(f"{name} has stride {x.stride(-1)} in its last dim; it must be 1")
    if lengths is not None and not lengths.is_contiguous():
        reasons.append("lengths is not contiguous")
    return reasons


register_backend(
    Backend(
        name="cpu",
        unavailable=_unavailable,
        implementations={
            "attention": Implementation(_attention, _attention_unsupported),
            "linear": Implementation(OPS["linear"].eager, nothing),
            "linear_backward_x": Implementation(OPS["linear_backward_x"].eager, nothing),
            "linear_backward_weight": Implementation(OPS["linear_backward_weight"].eager, nothing),
            "linear_cross_entropy": Implementation(linear_cross_entropy_in_blocks, nothing),
            "rms_norm": Implementation(_rms_norm, _rms_norm_unsupported),
        },
    )
)
