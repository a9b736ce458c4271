"""The C++ kernels of `llama_fast._cpu`: a launcher and its limits for each op.

The ops have checked shapes, dtypes and devices before a launcher runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ..ops.attention import lse_dtype, too_long
from ..ops.cross_entropy import chunked as linear_cross_entropy_in_blocks
from ..ops.kv_append import too_long as too_long_for_cache
from ..registry import OPS, Backend, Implementation, nothing, register_backend
from .layout import DTYPES
from .layout import reasons as _reasons
from .layout import rows as _rows
from .layout import rows_reasons as _rows_reasons

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

# Elements from which an output is worth huge pages.
LARGE = 2**21


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


def _new(x: torch.Tensor) -> torch.Tensor:
    """A fresh contiguous tensor of x's shape and dtype; torch.empty takes three times as long."""
    if x.is_contiguous():
        y = torch.empty_like(x)
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() >= LARGE:
        _cpu.prefer_huge_pages(y.data_ptr(), y.nbytes)
    return y


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = _new(x)
    _cpu.rms_norm(
        DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), y.data_ptr(), _rows(x), x.shape[-1], eps
    )
    return y


def _rms_norm_unsupported(x: torch.Tensor, weight: torch.Tensor, eps: float) -> list[str]:
    return _rows_reasons(x=x, weight=weight)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, total = _new(x), _new(x)
    _cpu.add_rms_norm(
        DTYPES[x.dtype],
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        total.data_ptr(),
        _rows(x),
        _rows(residual),
        x.shape[-1],
        eps,
    )
    return y, total


def _add_rms_norm_unsupported(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> list[str]:
    return _rows_reasons(x=x, residual=residual, weight=weight)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    h = _new(gate)
    _cpu.swiglu(
        DTYPES[gate.dtype],
        gate.data_ptr(),
        up.data_ptr(),
        h.data_ptr(),
        _rows(gate),
        _rows(up),
        gate.shape[-1],
    )
    return h


def _swiglu_unsupported(gate: torch.Tensor, up: torch.Tensor) -> list[str]:
    return _rows_reasons(gate=gate, up=up)


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, H, D = q.shape
    of_rows = cos.ndim == 3
    q_out, k_out = _new(q), _new(k)
    _cpu.rope(
        DTYPES[q.dtype],
        q.data_ptr(),
        q.stride(),
        k.data_ptr(),
        k.stride(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        cos.data_ptr(),
        cos.stride(0) if of_rows else 0,
        cos.stride(-2),
        sin.data_ptr(),
        sin.stride(0) if of_rows else 0,
        sin.stride(-2),
        B,
        T,
        H,
        k.shape[2],
        D,
        interleaved,
    )
    return q_out, k_out


def _rope_unsupported(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> list[str]:
    return _reasons(q.dtype, q=q, k=k, cos=cos, sin=sin)


def _kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> torch.Tensor:
    B, T, H, D = q.shape
    S, P = k_cache.shape[1], cos.shape[0]
    q_out = _new(q)
    bad_row = _cpu.kv_append(
        DTYPES[q.dtype],
        q.data_ptr(),
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        q_out.data_ptr(),
        cos.data_ptr(),
        cos.stride(0),
        sin.data_ptr(),
        sin.stride(0),
        k_cache.data_ptr(),
        k_cache.stride(),
        v_cache.data_ptr(),
        v_cache.stride(),
        lengths.data_ptr(),
        lengths.stride(0),
        B,
        T,
        S,
        P,
        H,
        k.shape[2],
        D,
        interleaved,
    )
    if bad_row >= 0:
        raise too_long_for_cache(bad_row, int(lengths[bad_row]), S, P)
    return q_out


def _kv_append_unsupported(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> list[str]:
    return _reasons(q.dtype, q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    o = _new(q)
    B, T, H, _ = q.shape
    lse = torch.empty((B, H, T) if need_lse else 0, dtype=lse_dtype(q.dtype))
    bad_row = _cpu.attention(
        DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        o.data_ptr(),
        lse.data_ptr(),  # null when it is empty
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
    return o, lse


def _attention_unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> list[str]:
    reasons = _reasons(q.dtype, q=q, k=k, v=v)
    D = q.shape[-1]
    if D % 8 or D > 256:
        reasons.append(f"D is {D}; it must be a multiple of 8 up to 256")
    if lengths is not None and not lengths.is_contiguous():
        reasons.append("lengths is not contiguous")
    return reasons


# Rows of x up to which `linear` is limited by reading the weight, and our kernel serves it.
FEW_ROWS = 16


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    C_out, C_in = weight.shape
    if x.numel() > FEW_ROWS * C_in or C_in == 0:
        return F.linear(x, weight).contiguous()
    y = torch.empty((*x.shape[:-1], C_out), dtype=x.dtype)
    _cpu.linear(
        DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), y.data_ptr(), _rows(x), C_in, C_out
    )
    return y


def _linear_unsupported(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    return _rows_reasons(x=x)


def _linear_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    y = torch.empty((*x.shape[:-1], C_out), dtype=x.dtype)
    if x.shape[-1] == 0:
        return y.zero_()
    _cpu.linear_quantized(
        DTYPES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        y.data_ptr(),
        _rows(x),
        x.shape[-1],
        C_out,
        group_size,
        bits,
    )
    return y


def _linear_quantized_unsupported(x: torch.Tensor, *weight: torch.Tensor | int) -> list[str]:
    return _rows_reasons(x=x)


register_backend(
    Backend(
        name="cpu",
        unavailable=_unavailable,
        implementations={
            "attention": Implementation(_attention, _attention_unsupported),
            "linear": Implementation(_linear, _linear_unsupported),
            "linear_backward_x": Implementation(OPS["linear_backward_x"].eager, nothing),
            "linear_backward_weight": Implementation(OPS["linear_backward_weight"].eager, nothing),
            "linear_quantized": Implementation(_linear_quantized, _linear_quantized_unsupported),
            "linear_quantized_backward_x": Implementation(
                OPS["linear_quantized_backward_x"].eager, nothing
            ),
            "linear_cross_entropy": Implementation(linear_cross_entropy_in_blocks, nothing),
            "rms_norm": Implementation(_rms_norm, _rms_norm_unsupported),
            "add_rms_norm": Implementation(_add_rms_norm, _add_rms_norm_unsupported),
            "swiglu": Implementation(_swiglu, _swiglu_unsupported),
            "rope": Implementation(_rope, _rope_unsupported),
            "kv_append": Implementation(_kv_append, _kv_append_unsupported),
        },
    )
)
