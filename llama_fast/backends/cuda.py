"""The CUDA C++ kernels of `llama_fast._cuda`: a launcher and its limits for each op.

The ops have checked shapes, dtypes and devices before a launcher runs. Kernels go into torch's
current stream of the tensors' device; nothing here waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch import OPS, Backend, Implementation, nothing, register_backend, step_memory
from ..dispatch.torch_private import current_stream
from ..errors import KernelError
from ..ops.checks import describe
from . import composed, cuda_device, limits
from .layout import dense

try:
    from .. import _cuda
except ImportError as error:
    _cuda = None
    _unavailable = [
        f"{limits.not_loaded('CUDA C++', '_cuda', error)}; they are built where the installation "
        "finds nvcc and a GPU, or when asked for: LLAMA_FAST_CUDA=all pip install . (or "
        "LLAMA_FAST_CUDA=90a for one architecture)"
    ]
else:
    _unavailable = []


def architectures() -> list[str]:
    """The GPU architectures of this build, such as ["80", "90a", "120+PTX"]."""
    return [] if _cuda is None else _cuda.architectures().split(",")


@functools.cache
def device_reasons(device: torch.device) -> list[str]:
    """Why this build cannot serve tensors of the device; nothing where it can."""
    if device.type != _cuda.device_type():
        return [f"the tensors are on {device}; the CUDA kernels take those of a GPU"]
    if device.type != "cuda":
        return []
    return cuda_device.reasons(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        architectures(),
        _cuda.driver_version(),
        _cuda.runtime_version(),
    )


@functools.cache
def _multiprocessors(index: int) -> int:
    return _cuda.multiprocessors(index)


def forget_device() -> None:
    """Forgets what was found out about devices; for tests that take another module for _cuda."""
    device_reasons.cache_clear()
    _has_warpgroups.cache_clear()
    _multiprocessors.cache_clear()


# Whether, from sm_90 on, kernels of decoding may begin before the one in front of them has ended
# and load their first weights meanwhile (programmatic dependent launch). No GPU has run that yet,
# so it must be asked for; and where it is, no weight may be written right before it is used.
OVERLAP = False


def _place(x: torch.Tensor) -> tuple[int, int, bool]:
    """The index of x's device, its current stream as an integer, and whether kernels overlap."""
    if not x.is_cuda:
        return 0, 0, OVERLAP
    index = x.get_device()
    return index, current_stream(index), OVERLAP


def _new(x: torch.Tensor) -> torch.Tensor:
    """A fresh contiguous tensor of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied where it does not begin at a multiple of 16 bytes, as a view of odd offset may."""
    return x.clone() if x.data_ptr() % 16 else x


def _whole_vectors(x: torch.Tensor) -> torch.Tensor:
    """x as rows of whole vectors of 16 bytes: copied, and zeros put behind, where they are not."""
    C = x.shape[-1]
    if C % 8 == 0 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1]):
        return x
    return F.pad(x, (0, -C % 8))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _cuda.rms_norm(_place(x), x, weight, eps, _new(x))


def _weight_gradient(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The partials of dw that the blocks of a norm's backward leave, and dw: two blocks for each
    multiprocessor share the rows."""
    C = x.shape[-1]
    N = x.numel() // C if C else 0
    partials = min(N, 2 * _multiprocessors(x.get_device() if x.is_cuda else 0))
    wide = torch.float64 if x.dtype is torch.float32 else torch.float32
    return x.new_empty((partials, C), dtype=wide), torch.empty_like(weight)


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    partials, dw = _weight_gradient(x, weight)
    return _cuda.rms_norm_backward(_place(x), dense(grad), x, weight, eps, partials, _new(x), dw)


def _rms_norm_backward_unsupported(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> list[str]:
    return limits.rows_reasons(x=x, weight=weight)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cuda.add_rms_norm(_place(x), x, residual, weight, eps, _new(x), _new(x))


def _add_rms_norm_backward(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    partials, dw = _weight_gradient(total, weight)
    return _cuda.add_rms_norm_backward(
        _place(total),
        dense(grad_y),
        dense(grad_total),
        total,
        weight,
        eps,
        partials,
        _new(total),
        dw,
    )


def _add_rms_norm_backward_unsupported(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> list[str]:
    return limits.rows_reasons(total=total, weight=weight)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _cuda.swiglu(_place(gate), gate, up, _new(gate))


def _swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cuda.swiglu_backward(_place(gate), dense(grad), gate, up, _new(gate), _new(up))


def _swiglu_backward_unsupported(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> list[str]:
    return limits.rows_reasons(gate=gate, up=up)


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cuda.rope(_place(q), q, k, cos, sin, interleaved, _new(q), _new(k))


def _kv_append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scales=None, v_scales=None
) -> torch.Tensor:
    return _cuda.kv_append(
        *(_place(q), q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved),
        *(k_scales, v_scales, _new(q)),
    )


# Whether attention of many queries goes to the kernel with wgmma and bulk copies on sm_90. No GPU
# has run that kernel yet, so it must be asked for: tests and benchmarks do, to compare the two.
WARPGROUPS = False


@functools.cache
def _has_warpgroups(device: torch.device) -> bool:
    """Whether the device is an sm_90 with code for sm_90a; the tests' host build runs it too."""
    if device.type != "cuda":
        return True
    built = {architecture.partition("+")[0] for architecture in architectures()}
    return "90a" in built and torch.cuda.get_device_capability(device) == (9, 0)


_arrived_by_stream: dict[Hashable, torch.Tensor] = {}


def _arrived(place: tuple[int, int, bool], count: int, device: torch.device) -> torch.Tensor:
    """Zeros that the blocks of a call count in and leave as zeros: for each stream its own, and for
    each captured step, which has no kernel that fills them."""
    kept = step_memory()
    if kept is None:
        # What is made while somebody else captures belongs to that graph alone.
        kept = {} if _capturing(device) else _arrived_by_stream
    key = "arrived", place, count, device
    if key not in kept:
        kept[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return kept[key]


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # torch asks the stream of its current device, and makes a context there if there was none.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _kv_splits(
    place: tuple[int, int, bool], q: torch.Tensor, S: int, K: int
) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
    """How many blocks share the keys of a KV head, and where there are several, memory for what
    each of them leaves and counts of those that have."""
    B, T, H, D = q.shape
    count = 1
    if _cuda.is_decode(T, H, K):
        count = _cuda.kv_splits(B, K, S, _multiprocessors(place[0]))
    if count == 1:
        return count, None, None
    size = B * H * T * count * _cuda.attention_partial_bytes(D)
    partials = torch.empty(size, dtype=torch.uint8, device=q.device)
    return count, partials, _arrived(place, B * K, q.device)


# Bytes of a cache in 8 bits that is turned into q's dtype for many queries: so many rows of the
# batch at a time, but one at least.
WIDE_BYTES = 2**28


def _attention(
    q, k, v, causal, scale, lengths, need_lse, k_scales=None, v_scales=None, cu_seqlens=None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    place = _place(q)
    wide = None, None
    if k_scales is not None and not _cuda.is_decode(T, H, K):
        row_bytes = 2 * S * K * D * q.element_size()
        wide_rows = max(1, min(B, WIDE_BYTES // max(1, row_bytes)))
        wide = tuple(q.new_empty(wide_rows, K, S, D) for _ in "kv")
    return _cuda.attention(
        *(place, q, k, v, causal, scale, lengths, k_scales, v_scales),
        cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
        *(_kv_splits(place, q, S, K) if cu_seqlens is None else (1, None, None)),
        *wide,
        WARPGROUPS and _has_warpgroups(q.device),
        _new(q),
        q.new_empty((B, H, T) if need_lse else 0, dtype=torch.float32),
    )


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
    found = limits.reasons(q.dtype, q=q, k=k, v=v)
    if q.dtype is torch.float32:
        found.append("q is torch.float32; it must be bfloat16 or float16")
    if q.shape[-1] not in (64, 128):
        found.append(f"D is {q.shape[-1]}; it must be 64 or 128")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            found.append(f"the heads of {name} do not all lie multiples of 16 bytes apart")
    if lengths is not None and not lengths.is_contiguous():
        found.append("lengths is not contiguous")
    if cu_seqlens is not None and cu_seqlens.shape[0] - 1 > limits.MAX_GRID:
        found.append(
            f"there are {cu_seqlens.shape[0] - 1} documents; a grid has room for {limits.MAX_GRID}"
        )
    return found


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if _takes_gemv(x, weight):
        return _gemv(_cuda.linear, x, weight, weight.shape[0])
    return F.linear(x, weight).contiguous()


def _linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if _takes_gemv(x, weight):
        return _gemv(_cuda.linear_swiglu, x, weight, weight.shape[0] // 2)
    return _swiglu(*_linear(x, weight).chunk(2, dim=-1))


def _takes_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take the product: few rows of a half type, and weights in whole vectors,
    as those of every model are. torch has it otherwise."""
    C_in = weight.shape[1]
    whole = C_in % 8 == 0 and weight.data_ptr() % 16 == 0
    return (
        x.dtype is not torch.float32 and 0 < C_in and x.numel() <= _cuda.GEMV_ROWS * C_in and whole
    )


def _gemv(
    launch: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, C_out: int
) -> torch.Tensor:
    """`linear` or `linear_swiglu` of few rows of x; y has C_out columns."""
    x = _whole_vectors(x)
    return launch(_place(x), x, weight, x.new_empty((*x.shape[:-1], C_out)))


def _linear_quantized(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    return _gemv_quantized(_cuda.linear_quantized, x, weight[3], *weight)


def _linear_swiglu_quantized(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    return _gemv_quantized(_cuda.linear_swiglu_quantized, x, weight[3] // 2, *weight)


def _gemv_quantized(
    launch: Callable[..., torch.Tensor],
    x: torch.Tensor,
    outputs: int,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """The same of a quantised weight; y has `outputs` columns."""
    x = _whole_vectors(x)
    y = x.new_empty((*x.shape[:-1], outputs))
    return launch(_place(x), x, qdata, scales, minima, bits, group_size, y)


def _linear_quantized_unsupported(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> list[str]:
    found = limits.rows_reasons(x=x)
    if x.dtype is torch.float32:
        found.append("x is torch.float32; it must be bfloat16 or float16")
    if (M := x.shape[:-1].numel()) > _cuda.GEMV_ROWS:
        found.append(f"x has {M} rows; at most {_cuda.GEMV_ROWS}")
    return found


def _row(
    op: str, launch: Callable[..., Any], unsupported: Callable[..., list[str]]
) -> Implementation:
    """A row of the table: the device is asked first, and a failed launch is told in words."""

    def guarded_launch(*args: Any) -> Any:
        try:
            return launch(*args)
        except RuntimeError as error:
            if not isinstance(error, _cuda.LaunchError):
                raise
            raise _failure(op, error, args) from error

    def guarded_unsupported(*args: Any) -> list[str]:
        return device_reasons(args[0].device) or unsupported(*args)

    return Implementation(guarded_launch, guarded_unsupported)


def _failure(op: str, error: RuntimeError, args: tuple) -> KernelError:
    given = ", ".join(describe(a) if isinstance(a, torch.Tensor) else repr(a) for a in args)
    return KernelError(
        f"{op}: {error}. It was given {given}. An error of an earlier kernel comes up at the next "
        "launch: run with CUDA_LAUNCH_BLOCKING=1 to see which one it was, or under "
        "compute-sanitizer; use_backend('eager') does without these kernels"
    )


def _of_torch(op: str) -> Implementation:
    """An op that is a product of matrices, which torch leaves to the vendor's library."""
    return _row(op, OPS[op].eager, nothing)


BACKEND = Backend(
    name="cuda",
    unavailable=_unavailable,
    settings=lambda: (OVERLAP, WARPGROUPS),
    refuses=lambda device: device_reasons(device),
    implementations={
        "rms_norm": _row("rms_norm", _rms_norm, limits.rms_norm),
        "rms_norm_backward": _row(
            "rms_norm_backward", _rms_norm_backward, _rms_norm_backward_unsupported
        ),
        "add_rms_norm": _row("add_rms_norm", _add_rms_norm, limits.add_rms_norm),
        "add_rms_norm_backward": _row(
            "add_rms_norm_backward", _add_rms_norm_backward, _add_rms_norm_backward_unsupported
        ),
        "swiglu": _row("swiglu", _swiglu, limits.swiglu),
        "swiglu_backward": _row("swiglu_backward", _swiglu_backward, _swiglu_backward_unsupported),
        "rope": _row("rope", _rope, limits.rope),
        "kv_append": _row("kv_append", _kv_append, limits.kv_append),
        "attention": _row("attention", _attention, _attention_unsupported),
        "linear": composed.linear(
            _row("linear", _linear, limits.linear),
            _row("linear", _linear_quantized, _linear_quantized_unsupported),
            composed.first(2, _row("linear", _linear_swiglu, limits.linear)),
            composed.first(
                7, _row("linear", _linear_swiglu_quantized, _linear_quantized_unsupported)
            ),
        ),
        "linear_backward_x": _of_torch("linear_backward_x"),
        "linear_backward_weight": _of_torch("linear_backward_weight"),
    },
)
register_backend(BACKEND)
