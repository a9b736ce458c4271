"""The C++ kernels of `llama_fast._cpu`: a launcher and its limits for each op.

The ops have checked shapes, dtypes and devices before a launcher runs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from ..dispatch import OPS, Backend, Implementation, nothing, register_backend
from ..errors import BackendError
from ..ops import cross_entropy
from ..ops.attention import lse_dtype
from ..ops.attention_checks import head_dim_reasons, unfit
from ..ops.kv_append import too_long as too_long_for_cache
from . import composed, limits
from .cpu_step import CpuRecorder
from .layout import dense, stride_reasons

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


_invariant_blocks = 0
_lock = threading.Lock()


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the block, a row of `linear` on the CPU has the same bits whatever is beside it.

    So the logits of a token depend neither on the batch, nor on how many tokens a step or a piece
    of the prompt has, and its log-probabilities are those that a training step computes. By default
    few rows are multiplied by GEMV and many by GEMM, which add in different orders; here all are
    multiplied by GEMM, which costs a decode step time. docs/numerics.md says what is so at all
    times. Holds for every thread. Raises BackendError without the C++ kernels.
    """
    if _cpu is None:
        raise BackendError("batch_invariant() needs the C++ kernels: " + _unavailable[0])
    _count_invariant(1)
    try:
        yield
    finally:
        _count_invariant(-1)


def _count_invariant(more: int) -> None:
    global _invariant_blocks
    with _lock:
        _invariant_blocks += more
        _cpu.set_batch_invariant(_invariant_blocks > 0)


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
# their signature, for which it is settled beforehand how the results are made.


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Launcher:
    new = _maker(x)
    return lambda x, weight, eps: _cpu.rms_norm(x, weight, eps, new())


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> Launcher:
    new = _maker(x)
    return lambda x, residual, weight, eps: _cpu.add_rms_norm(
        x, residual, weight, eps, new(), new()
    )


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> Launcher:
    new = _maker(gate)
    return lambda gate, up: _cpu.swiglu(gate, up, new())


def _norm_backward(grad, grad_total, x, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of both norms; of rms_norm without that of its sum, `grad_total`."""
    partials = _cpu.norm_partials(x.shape[:-1].numel())
    parts = torch.empty((partials, x.shape[-1]), dtype=torch.float32, device="cpu")
    new, new_dw = _maker(x), _maker(weight)
    return _cpu.rms_norm_backward(grad, grad_total, x, weight, eps, parts, new(), new_dw())


def _rms_norm_backward(grad, x, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm_backward(dense(grad), None, x, weight, eps)


def _add_rms_norm_backward(
    grad_y, grad_total, total, weight, eps
) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm_backward(dense(grad_y), dense(grad_total), total, weight, eps)


def _swiglu_backward(grad, gate, up) -> tuple[torch.Tensor, torch.Tensor]:
    new = _maker(gate)
    return _cpu.swiglu_backward(dense(grad), gate, up, new(), new())


def _adamw(
    param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0,
    seed=None, exp_avg_scale=None, exp_avg_sq_scale=None,
) -> None:  # fmt: skip
    numbers = step, lr, beta1, beta2, eps, weight_decay, grad_scale, -1 if seed is None else seed
    tensors = param, grad, exp_avg, exp_avg_sq
    _cpu.adamw(*tensors, *numbers, exp_avg_scale, exp_avg_sq_scale)


def _adamw_unsupported(param, *others: Any) -> list[str]:
    return limits.reasons(param.dtype)


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Launcher:
    new_q, new_k = _maker(q), _maker(k)
    return lambda q, k, cos, sin, interleaved: _cpu.rope(
        q, k, cos, sin, interleaved, new_q(), new_k()
    )


def _kv_append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scales=None, v_scales=None
) -> Launcher:
    new, S, P = _maker(q), k_cache.shape[1], cos.shape[0]

    def launch(
        q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scales=None, v_scales=None
    ) -> torch.Tensor:
        q_out = new()
        row = _cpu.kv_append(
            q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scales, v_scales, q_out
        )
        if row >= 0:
            raise too_long_for_cache(row, int(lengths[row]), S, P)
        return q_out

    return launch


def _attention(
    q, k, v, causal, scale, lengths, need_lse, k_scales=None, v_scales=None, cu_seqlens=None
) -> Launcher:
    (B, T, H, _), S = q.shape, k.shape[1]
    new, no_lse = _maker(q), torch.empty(0, dtype=lse_dtype(q.dtype), device="cpu")
    new_lse = _maker(no_lse, (B, H, T) if need_lse else (0,))

    def launch(
        q, k, v, causal, scale, lengths, need_lse, k_scales=None, v_scales=None, cu_seqlens=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = new(), new_lse()
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
        row = _cpu.attention(
            q, k, v, causal, scale, lengths, k_scales, v_scales, cu_seqlens, o, lse
        )
        if row >= 0:
            raise unfit(row, S, lengths, cu_seqlens)
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
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> list[str]:
    reasons = limits.reasons(q.dtype, q=q, k=k, v=v) + head_dim_reasons(q.shape[-1])
    if lengths is not None and not lengths.is_contiguous():
        reasons.append("lengths is not contiguous")
    return reasons


def _attention_backward(grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None) -> Launcher:
    new_q, new_k, new_v = _maker(q), _maker(k), _maker(v)
    S = k.shape[1]

    def launch(
        grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = new_q(), new_k(), new_v()
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
        row = _cpu.attention_backward(
            dense(grad), q, k, v, o, lse, causal, scale, lengths, cu_seqlens, dq, dk, dv
        )
        if row >= 0:
            raise unfit(row, S, lengths, cu_seqlens)
        return dq, dk, dv

    return launch


def _attention_backward_unsupported(
    grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None
) -> list[str]:
    reasons = _attention_unsupported(
        q, k, v, causal, scale, lengths, True, cu_seqlens=cu_seqlens
    ) + stride_reasons(o=o)
    if lse.dtype is not lse_dtype(q.dtype) or not lse.is_contiguous():
        layout = "contiguous" if lse.is_contiguous() else "not contiguous"
        reasons.append(f"lse is {lse.dtype}, {layout}; it must be contiguous {lse_dtype(q.dtype)}")
    return reasons


def gemv_rows(dtype: torch.dtype) -> int:
    """The most rows of x that GEMV takes, in the instruction set in use."""
    like = torch.empty(0, dtype=dtype, device="cpu")
    return _cpu.gemv_rows(like, torch.backends.mkldnn.is_available())


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ for many rows of x. W's rows are read as they lie."""
    return _product(weight, False, x, False, (*x.shape[:-1], weight.shape[0]), transposed=True)


def multiply_backward_x(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """g W."""
    shape = (*grad.shape[:-1], weight.shape[1])
    return _product(grad.contiguous(), False, weight.contiguous(), True, shape)


def multiply_backward_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gᵀ x."""
    shape = (grad.shape[-1], x.shape[-1])
    return _product(grad.contiguous(), True, x.contiguous(), True, shape)


def _product(
    rows: torch.Tensor,
    rows_transposed: bool,
    lanes: torch.Tensor,
    lanes_transposed: bool,
    shape: tuple[int, ...],
    transposed: bool = False,
) -> torch.Tensor:
    """rows · lanesᵀ as a new tensor of `shape`, (R, L) or with `transposed` (L, R) when flattened.

    GemmArgs of csrc/args.h says what rows and lanes are.
    """
    out = _maker(rows, shape)()
    if out.numel():
        K = rows.shape[:-1].numel() if rows_transposed else rows.shape[-1]
        _cpu.gemm(rows, rows_transposed, lanes, lanes_transposed, K, out, transposed)
    return out


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Launcher:
    if weight.shape[1] == 0 or x.shape[:-1].numel() > _cpu.GEMV_ROWS:
        return _linear_by_choice
    return _gemv(x, weight)


def _gemv(x: torch.Tensor, weight: torch.Tensor) -> Launcher:
    new = _maker(x, (*x.shape[:-1], weight.shape[0]))
    return lambda x, weight: _cpu.gemv(x, weight, new())


def _linear_by_choice(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Which product that is depends on the instruction set in use: it is chosen in every call."""
    product = _linear_product(x, weight)
    if product == "gemv":
        return _gemv(x, weight)(x, weight)
    return (multiply if product == "gemm" else OPS["linear"].eager)(x, weight)


def _linear_product(x: torch.Tensor, weight: torch.Tensor) -> str:
    if x.numel() == 0:
        return "torch"
    return _cpu.linear_product(x, torch.backends.mkldnn.is_available())


def _gradient_product(grad: torch.Tensor, other: torch.Tensor) -> str:
    if grad.numel() == 0:
        return "torch"
    return _cpu.gradient_product(grad, torch.backends.mkldnn.is_available())


def _linear_backward_x(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    own = _gradient_product(grad, weight) == "gemm"
    return (multiply_backward_x if own else OPS["linear_backward_x"].eager)(grad, weight)


def _linear_backward_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    own = _gradient_product(grad, x) == "gemm"
    return (multiply_backward_weight if own else OPS["linear_backward_weight"].eager)(grad, x)


_PRODUCTS = {
    "gemv": "by GEMV, the kernel for few rows",
    "gemm": "by the matrix product of C++",
    "torch": "by torch's own matrix product",
}


def _linear_how(x: torch.Tensor, weight: torch.Tensor) -> str:
    return _PRODUCTS[_linear_product(x, weight)]


def _gradient_how(grad: torch.Tensor, other: torch.Tensor) -> str:
    return _PRODUCTS[_gradient_product(grad, other)]


def _linear_quantized(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> Launcher:
    new = _maker(x, (*x.shape[:-1], C_out))
    if x.shape[-1] == 0:
        return lambda *args: new().zero_()
    return lambda x, qdata, scales, minima, C_out, bits, group_size: _cpu.linear_quantized(
        x, qdata, scales, minima, bits, group_size, new()
    )


def _linear_quantized_backward_x(
    grad: torch.Tensor,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    C_in: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    dx = _maker(grad, (*grad.shape[:-1], C_in))()
    if grad.numel() == 0:
        return dx.zero_()
    return _cpu.linear_quantized_backward_x(
        grad.contiguous(), qdata, scales, minima, bits, group_size, dx
    )


def _planned(
    plan: Callable[..., Launcher],
    unsupported: Callable[..., list[str]],
    how: Callable[..., str] | None = None,
) -> Implementation:
    return Implementation(lambda *args: plan(*args)(*args), unsupported, how, plan)


LINEAR = _planned(_linear, limits.linear, _linear_how)
LINEAR_QUANTIZED = _planned(_linear_quantized, limits.linear)
SWIGLU = _planned(_swiglu, limits.swiglu)
IN_BLOCKS = Implementation(
    cross_entropy.chunked, nothing, lambda *args: "by linear, a block of rows at a time"
)
BACKWARD_X = Implementation(_linear_backward_x, nothing, _gradient_how)
BACKWARD_X_QUANTIZED = Implementation(
    _linear_quantized_backward_x, nothing, lambda *args: _PRODUCTS["gemm"]
)

register_backend(
    Backend(
        name="cpu",
        unavailable=_unavailable,
        recorder=lambda: CpuRecorder(_cpu.Tape),
        settings=None if _cpu is None else lambda: (isa(),),
        reserve=_reserve,
        batch_invariant=batch_invariant,
        implementations={
            "attention": _planned(_attention, _attention_unsupported),
            "attention_backward": _planned(_attention_backward, _attention_backward_unsupported),
            "linear": composed.linear(
                LINEAR,
                LINEAR_QUANTIZED,
                composed.then_swiglu(LINEAR, SWIGLU, 2),
                composed.then_swiglu(LINEAR_QUANTIZED, SWIGLU, 7),
            ),
            "linear_backward_x": composed.linear_backward_x(BACKWARD_X, BACKWARD_X_QUANTIZED),
            "linear_backward_weight": Implementation(
                _linear_backward_weight, nothing, _gradient_how
            ),
            "linear_cross_entropy": composed.linear_cross_entropy(
                IN_BLOCKS, IN_BLOCKS._replace(unsupported=limits.linear)
            ),
            "rms_norm": _planned(_rms_norm, limits.rms_norm),
            "rms_norm_backward": Implementation(
                _rms_norm_backward, lambda grad, x, weight, eps: limits.rms_norm(x, weight, eps)
            ),
            "add_rms_norm": _planned(_add_rms_norm, limits.add_rms_norm),
            "add_rms_norm_backward": Implementation(
                _add_rms_norm_backward,
                lambda grad_y, grad_total, total, weight, eps: limits.rms_norm(total, weight, eps),
            ),
            "adamw": Implementation(_adamw, _adamw_unsupported),
            "swiglu": SWIGLU,
            "swiglu_backward": Implementation(
                _swiglu_backward, lambda grad, gate, up: limits.swiglu(gate, up)
            ),
            "rope": _planned(_rope, limits.rope),
            "kv_append": _planned(_kv_append, limits.kv_append),
        },
    )
)
