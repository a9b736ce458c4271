"""The C++ kernels of `llama_fast._cpu`: a launcher and its limits for each op.

The ops have checked shapes, dtypes and devices before a launcher runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from ..dispatch import OPS, Backend, Implementation, nothing, register_backend
from ..ops import cross_entropy
from ..ops.attention import head_dim_reasons, lse_dtype, too_long
from ..ops.kv_append import too_long as too_long_for_cache
from . import composed, limits
from .cpu_step import CpuRecorder
from .layout import DTYPES
from .layout import rows as _rows

try:
    from .. import _cpu
except ImportError as error:
    _cpu = None
    _unavailable = [
        f"{limits.not_loaded('C++', '_cpu', error)}; install the package with a C++ compiler at "
        "hand: pip install ."
    ]
else:
    _unavailable = []

Launcher = Callable[..., Any]
# Elements up to which memory may be held for a pattern of an output.
SMALL = 2**14
# Elements from which an output is worth huge pages.
LARGE = 2**21
# Bytes from which glibc at the latest maps an allocation anew each time (M_MMAP_THRESHOLD): such
# outputs lie in memory that is used again.
MAPPED = 2**25


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


def _reserve(y: torch.Tensor) -> torch.Tensor:
    """y, its fresh memory in huge pages where it is large."""
    if y.numel() >= LARGE:
        _cpu.prefer_huge_pages(y.data_ptr(), y.nbytes)
    return y


def _maker(like: torch.Tensor, shape: tuple[int, ...] | None = None) -> Callable[[], torch.Tensor]:
    """What makes fresh contiguous tensors of `like`'s dtype and of its shape, or of `shape`."""
    shape, dtype = tuple(like.shape if shape is None else shape), like.dtype
    numel = math.prod(shape)
    if numel * dtype.itemsize >= MAPPED:
        kind = (dtype is torch.bfloat16, dtype.itemsize, shape)
        return lambda: from_dlpack(_cpu.large_tensor(*kind))
    # torch.empty takes twice as long as torch.empty_like.
    if numel <= SMALL:
        return partial(torch.empty_like, torch.empty(shape, dtype=dtype, device="cpu"))
    pattern = torch.empty((), dtype=dtype, device="cpu").expand(
        shape
    )  # one element stands for them all
    make = partial(torch.empty_like, pattern, memory_format=torch.contiguous_format)
    return (lambda: _reserve(make())) if numel >= LARGE else make


# Each of the functions that follow takes an op's arguments and returns a launcher for calls of
# their kind: whatever depends on shapes, strides and dtypes is settled beforehand, and what is left
# are the addresses.


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Launcher:
    new = _maker(x)
    run = _cpu.rms_norm(DTYPES[x.dtype], _rows(x), x.shape[-1], eps)

    def launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = new()
        run(x.data_ptr(), weight.data_ptr(), y.data_ptr())
        return y

    return launch


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> Launcher:
    new = _maker(x)
    run = _cpu.add_rms_norm(DTYPES[x.dtype], _rows(x), _rows(residual), x.shape[-1], eps)

    def launch(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = new(), new()
        run(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr())
        return y, total

    return launch


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> Launcher:
    new = _maker(gate)
    run = _cpu.swiglu(DTYPES[gate.dtype], _rows(gate), _rows(up), gate.shape[-1])

    def launch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        h = new()
        run(gate.data_ptr(), up.data_ptr(), h.data_ptr())
        return h

    return launch


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Launcher:
    new_q, new_k = _maker(q), _maker(k)
    angle_strides = ((t.stride(0) if t.ndim == 3 else 0, t.stride(-2)) for t in (cos, sin))
    B, T, H, D = q.shape
    sizes = (B, T, H, k.shape[2], D)
    run = _cpu.rope(DTYPES[q.dtype], q.stride(), k.stride(), *angle_strides, *sizes, interleaved)

    def launch(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_out, k_out = new_q(), new_k()
        run(
            q.data_ptr(),
            k.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            q_out.data_ptr(),
            k_out.data_ptr(),
        )
        return q_out, k_out

    return launch


def _kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> Launcher:
    new = _maker(q)
    B, T, H, D = q.shape
    S, P = k_cache.shape[1], cos.shape[0]
    run = _cpu.kv_append(
        DTYPES[q.dtype],
        q.stride(),
        k.stride(),
        v.stride(),
        cos.stride(0),
        sin.stride(0),
        k_cache.stride(),
        v_cache.stride(),
        lengths.stride(0),
        *(B, T, S, P, H, k.shape[2], D),
        interleaved,
    )

    def launch(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved) -> torch.Tensor:
        q_out = new()
        bad_row = run(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            lengths.data_ptr(),
            q_out.data_ptr(),
        )
        if bad_row >= 0:
            raise too_long_for_cache(bad_row, int(lengths[bad_row]), S, P)
        return q_out

    return launch


def _kv_append_quantized(
    q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved
) -> Launcher:
    new = _maker(q)
    B, T, H, D = q.shape
    S, P = k_codes.shape[1], cos.shape[0]
    run = _cpu.kv_append_quantized(
        DTYPES[q.dtype],
        q.stride(),
        k.stride(),
        v.stride(),
        cos.stride(0),
        sin.stride(0),
        (k_codes.stride(), k_scales.stride()),
        (v_codes.stride(), v_scales.stride()),
        lengths.stride(0),
        *(B, T, S, P, H, k.shape[2], D),
        interleaved,
    )

    def launch(
        q, k, v, cos, sin, k_codes, k_scales, v_codes, v_scales, lengths, interleaved
    ) -> torch.Tensor:
        q_out = new()
        bad_row = run(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_codes.data_ptr(),
            k_scales.data_ptr(),
            v_codes.data_ptr(),
            v_scales.data_ptr(),
            lengths.data_ptr(),
            q_out.data_ptr(),
        )
        if bad_row >= 0:
            raise too_long_for_cache(bad_row, int(lengths[bad_row]), S, P)
        return q_out

    return launch


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> Launcher:
    new = _maker(q)
    B, T, H, D = q.shape
    S = k.shape[1]
    no_lse = torch.empty(0, dtype=lse_dtype(q.dtype), device="cpu")
    new_lse = _maker(no_lse, (B, H, T) if need_lse else (0,))
    factor = D**-0.5 if scale is None else scale
    run = _cpu.attention(
        DTYPES[q.dtype], q.shape, k.shape, q.stride(), k.stride(), v.stride(), causal, factor
    )

    def launch(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        scale: float | None,
        lengths: torch.Tensor | None,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = new(), new_lse()
        bad_row = run(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            o.data_ptr(),
            lse.data_ptr(),  # null when it is empty
        )
        if bad_row >= 0:
            raise too_long(bad_row, int(lengths[bad_row]), S)
        return o, lse

    return launch


def _attention_unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> list[str]:
    reasons = limits.reasons(q.dtype, q=q, k=k, v=v) + head_dim_reasons(q.shape[-1])
    if lengths is not None and not lengths.is_contiguous():
        reasons.append("lengths is not contiguous")
    return reasons


def _attention_quantized(
    q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths
) -> Launcher:
    new = _maker(q)
    S = k_codes.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    run = _cpu.attention_quantized(
        DTYPES[q.dtype],
        q.shape,
        k_codes.shape,
        q.stride(),
        (k_codes.stride(), k_scales.stride()),
        (v_codes.stride(), v_scales.stride()),
        causal,
        factor,
    )

    def launch(q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths) -> torch.Tensor:
        o = new()
        bad_row = run(
            q.data_ptr(),
            k_codes.data_ptr(),
            k_scales.data_ptr(),
            v_codes.data_ptr(),
            v_scales.data_ptr(),
            0 if lengths is None else lengths.data_ptr(),
            o.data_ptr(),
        )
        if bad_row >= 0:
            raise too_long(bad_row, int(lengths[bad_row]), S)
        return o

    return launch


def _attention_quantized_unsupported(
    q, k_codes, k_scales, v_codes, v_scales, causal, scale, lengths
) -> list[str]:
    return _attention_unsupported(q, k_codes, v_codes, causal, scale, lengths, False)


# Rows of x up to which `linear` reads the weight once and is limited by that: torch's product is no
# faster up to the first number, our own up to the second. Both were measured; see docs/log.md.
FEW_ROWS, FEW_ROWS_BESIDE_OWN = 16, 28
# Rows from which our own product is the faster one for the gradients.
GRADIENT_ROWS = 8


def few_rows(dtype: torch.dtype) -> int:
    """The most rows of x that the kernel for few rows takes, in the instruction set in use."""
    return FEW_ROWS_BESIDE_OWN if _own_product(dtype) else FEW_ROWS


def _own_product(dtype: torch.dtype) -> bool:
    """Whether products of many rows are made here rather than by torch, in the instruction set in
    use: for the half types, where torch (MKL, oneDNN) converts them a slow way. With AVX512_BF16
    oneDNN has bfloat16 instructions to use, if torch was built with it; and no vector instructions
    of ours means that torch's are better."""
    isa = _cpu.isa()
    if isa == "scalar" or dtype not in (torch.bfloat16, torch.float16):
        return False
    onednn = isa == "avx512_bf16" and torch.backends.mkldnn.is_available()
    return dtype is torch.float16 or not onednn


def _product(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    K: int,
    rows: tuple,
    lanes: tuple,
    transposed: bool = False,
) -> torch.Tensor:
    """rows · lanesᵀ as a new tensor of `shape`, (R, L) or with `transposed` (L, R) when flattened.

    A side is (tensor, Rows, transposed): MatrixSide of csrc/cpu/kernels.h, which says what `rows`
    and `lanes` are.
    """
    out = _maker(rows[0], shape)()
    R, L = out.shape[-1], out.shape[:-1].numel()
    if not transposed:
        R, L = L, R
    if out.numel():
        (a, a_rows, a_transposed), (b, b_rows, b_transposed) = rows, lanes
        _cpu.matmul(
            DTYPES[dtype],
            a.data_ptr(),
            a_rows,
            a_transposed,
            b.data_ptr(),
            b_rows,
            b_transposed,
            out.data_ptr(),
            transposed,
            R,
            L,
            K,
        )
    return out


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ for many rows of x, of a half type. W's rows are read as they lie."""
    C_out, C_in = weight.shape
    shape = (*x.shape[:-1], C_out)
    rows, lanes = (weight, _rows(weight), False), (x, _rows(x), False)
    return _product(x.dtype, shape, C_in, rows, lanes, transposed=True)


def multiply_backward_x(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """g W."""
    grad, weight = grad.contiguous(), weight.contiguous()
    C_out, C_in = weight.shape
    shape = (*grad.shape[:-1], C_in)
    rows, lanes = (grad, _rows(grad), False), (weight, _rows(weight), True)
    return _product(grad.dtype, shape, C_out, rows, lanes)


def multiply_backward_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gᵀ x."""
    grad, x = grad.contiguous(), x.contiguous()
    shape = torch.Size((grad.shape[-1], x.shape[-1]))
    rows, lanes = (grad, _rows(grad), True), (x, _rows(x), True)
    return _product(grad.dtype, shape, grad.shape[:-1].numel(), rows, lanes)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Launcher:
    C_in = weight.shape[1]
    if C_in == 0 or x.numel() > FEW_ROWS * C_in:
        return _linear_of_many_rows
    return _linear_of_few_rows(x, weight)


def _linear_of_many_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Which product that is depends on the instruction set in use: it is chosen in every call."""
    if 0 < x.numel() <= few_rows(x.dtype) * weight.shape[1]:
        return _linear_of_few_rows(x, weight)(x, weight)
    own = _own_product(x.dtype) and weight.shape[1]
    return (multiply if own else OPS["linear"].eager)(x, weight)


def _linear_of_few_rows(x: torch.Tensor, weight: torch.Tensor) -> Launcher:
    C_out, C_in = weight.shape
    new = _maker(x, (*x.shape[:-1], C_out))
    run = _cpu.linear(DTYPES[x.dtype], _rows(x), C_in, C_out)

    def launch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = new()
        run(x.data_ptr(), weight.data_ptr(), y.data_ptr())
        return y

    return launch


def _linear_how(x: torch.Tensor, weight: torch.Tensor) -> str:
    if 0 < x.numel() <= few_rows(x.dtype) * weight.shape[1]:
        return "by the kernel for few rows"
    return _product_how(_own_product(x.dtype))


def _own_gradient(grad: torch.Tensor) -> bool:
    return grad.shape[:-1].numel() >= GRADIENT_ROWS and _own_product(grad.dtype)


def _linear_backward_x(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    own = _own_gradient(grad) and weight.shape[0]
    return (multiply_backward_x if own else OPS["linear_backward_x"].eager)(grad, weight)


def _linear_backward_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    own = _own_gradient(grad)
    return (multiply_backward_weight if own else OPS["linear_backward_weight"].eager)(grad, x)


def _gradient_how(grad: torch.Tensor, other: torch.Tensor) -> str:
    return _product_how(_own_gradient(grad))


def _product_how(own: bool) -> str:
    return "by the matrix product of C++" if own else "by torch's own matrix product"


def _linear_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> Launcher:
    new, C_in = _maker(x, (*x.shape[:-1], C_out)), x.shape[-1]
    if C_in == 0:
        return lambda *args: new().zero_()
    run = _cpu.linear_quantized(DTYPES[x.dtype], _rows(x), C_in, C_out, group_size, bits)

    def launch(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        C_out: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        y = new()
        run(
            x.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            y.data_ptr(),
        )
        return y

    return launch


def _prepared(
    prepare: Callable[..., Launcher],
    unsupported: Callable[..., list[str]],
    how: Callable[..., str] | None = None,
) -> Implementation:
    return Implementation(lambda *args: prepare(*args)(*args), unsupported, how, prepare)


LINEAR = _prepared(_linear, limits.linear, _linear_how)
LINEAR_QUANTIZED = _prepared(_linear_quantized, limits.linear)
SWIGLU = _prepared(_swiglu, limits.swiglu)
IN_BLOCKS = Implementation(
    cross_entropy.chunked, nothing, lambda *args: "by linear, a block of rows at a time"
)
BACKWARD_X = Implementation(_linear_backward_x, nothing, _gradient_how)

register_backend(
    Backend(
        name="cpu",
        unavailable=_unavailable,
        recorder=lambda: CpuRecorder(_cpu.Tape),
        settings=None if _cpu is None else lambda: (isa(),),
        reserve=_reserve,
        implementations={
            "attention": composed.attention(
                _prepared(_attention, _attention_unsupported),
                _prepared(_attention_quantized, _attention_quantized_unsupported),
            ),
            "linear": composed.linear(
                LINEAR,
                LINEAR_QUANTIZED,
                composed.then_swiglu(LINEAR, SWIGLU, 2),
                composed.then_swiglu(LINEAR_QUANTIZED, SWIGLU, 7),
            ),
            "linear_backward_x": composed.linear_backward_x(
                BACKWARD_X, Implementation(OPS["linear_backward_x"].eager, nothing)
            ),
            "linear_backward_weight": Implementation(
                _linear_backward_weight, nothing, _gradient_how
            ),
            "linear_cross_entropy": composed.linear_cross_entropy(
                IN_BLOCKS, IN_BLOCKS._replace(unsupported=limits.linear)
            ),
            "rms_norm": _prepared(_rms_norm, limits.rms_norm),
            "add_rms_norm": _prepared(_add_rms_norm, limits.add_rms_norm),
            "swiglu": SWIGLU,
            "rope": _prepared(_rope, limits.rope),
            "kv_append": composed.kv_append(
                _prepared(_kv_append, limits.kv_append),
                _prepared(_kv_append_quantized, limits.kv_append_quantized),
            ),
        },
    )
)
