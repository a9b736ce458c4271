"""The Triton kernels of `llama_fast.triton_kernels`: a row for each op, and what it cannot serve.

The launchers stand beside their kernels. Triton takes most of a second to import, so they are
imported at the first call of an op that a Triton kernel may serve.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from ..dispatch import OPS, Backend, Implementation, register_backend
from ..ops.attention_checks import head_dim_reasons
from ..ops.cross_entropy import chunked
from ..utils.environment import triton_interpreter
from . import composed, limits
from .layout import DTYPES, dense, stride_reasons

INTERPRETED = triton_interpreter()


@functools.cache
def kernels(stem: str) -> Any:
    """The module triton_kernels/<stem>.py."""
    return import_module(f"llama_fast.triton_kernels.{stem}")


def implementation(
    stem: str, name: str, reasons: Callable[..., list[str]], grads: int = 0
) -> Implementation:
    """The launcher `name` of triton_kernels/<stem>.py, with `reasons` beside those of any kernel.

    grads  how many of the first arguments are gradients: autograd makes them of any layout
    """

    def launch(*args: Any) -> Any:
        args = (*map(dense, args[:grads]), *args[grads:])
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return getattr(kernels(stem), name)(*args)
        return getattr(kernels(stem), name)(*args)

    def unsupported(*args: Any) -> list[str]:
        return device_reasons(args[0]) or reasons(*args[grads:])

    return Implementation(launch, unsupported)


def device_reasons(x: torch.Tensor) -> list[str]:
    reasons = []
    if not (x.is_cuda or INTERPRETED):
        reasons.append(
            f"it is given a tensor on {x.device}; Triton's kernels run on GPUs, and on the CPU "
            "only in its interpreter: set TRITON_INTERPRET=1 before the program starts"
        )
    if x.dtype not in DTYPES:
        reasons.append(f"{x.dtype} is not one of float32, bfloat16, float16")
    return reasons


def rows_reasons(**tensors: torch.Tensor) -> list[str]:
    """Tensors of one shape that a kernel walks as rows."""
    if all(x.is_contiguous() for x in tensors.values()):
        return []
    return stride_reasons(**tensors) or kernels("rows").too_many_dims(**tensors)


def norm_reasons(weight: torch.Tensor, **tensors: torch.Tensor) -> list[str]:
    return stride_reasons(weight=weight) + rows_reasons(**tensors)


def _rms_norm(x, weight, eps) -> list[str]:
    return norm_reasons(weight, x=x)


def _add_rms_norm(x, residual, weight, eps) -> list[str]:
    return norm_reasons(weight, x=x, residual=residual)


def _swiglu(gate, up) -> list[str]:
    return rows_reasons(gate=gate, up=up)


def _rope(q, k, cos, sin, interleaved) -> list[str]:
    return stride_reasons(q=q, k=k, cos=cos, sin=sin)


def _kv_append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale=None, v_scale=None
) -> list[str]:
    return stride_reasons(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)


def _attention(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None, cu_seqlens=None
) -> list[str]:
    return attention_reasons(q, k, v, scale, lengths, cu_seqlens)


def _attention_backward(q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None) -> list[str]:
    return attention_reasons(q, k, v, scale, lengths, cu_seqlens) + stride_reasons(o=o)


def attention_reasons(q, k, v, scale, lengths, cu_seqlens) -> list[str]:
    reasons = stride_reasons(q=q, k=k, v=v) + head_dim_reasons(q.shape[-1])
    if scale is not None and not scale > 0:
        reasons.append(f"scale is {scale}; it must be positive")
    if lengths is not None and not lengths.is_contiguous():
        reasons.append("lengths is not contiguous")
    if cu_seqlens is not None:
        programs = (cu_seqlens.shape[0] - 1) * k.shape[2]
        if programs > limits.MAX_GRID:
            reasons.append(
                f"documents times K is {programs}; a grid has room for {limits.MAX_GRID}"
            )
    return reasons


def _linear_quantized(x, weight, scales, minima, C_out, bits, group_size) -> list[str]:
    return rows_reasons(x=x)


def _linear_cross_entropy(x, *others: Any) -> list[str]:
    return stride_reasons(x=x)


def _adamw(param, *others: Any) -> list[str]:
    return []  # the op itself asks for contiguous tensors


def products(name: str) -> Implementation:
    """A matrix product, which torch's libraries serve best."""
    return Implementation(OPS[name].eager, lambda *args: device_reasons(args[0]))


SWIGLU = implementation("swiglu", "swiglu", _swiglu)
LINEAR = products("linear")
LINEAR_QUANTIZED = implementation("linear", "linear", _linear_quantized)

register_backend(
    Backend(
        name="triton",
        unavailable=[]
        if importlib.util.find_spec("triton")
        else ["Triton is not installed; on Linux: pip install triton"],
        implementations={
            "rms_norm": implementation("rms_norm", "rms_norm", _rms_norm),
            "rms_norm_backward": implementation(
                "rms_norm", "rms_norm_backward", _rms_norm, grads=1
            ),
            "add_rms_norm": implementation("add_rms_norm", "add_rms_norm", _add_rms_norm),
            "add_rms_norm_backward": implementation(
                "add_rms_norm", "add_rms_norm_backward", _rms_norm, grads=2
            ),
            "adamw": implementation("adamw", "adamw", _adamw),
            "swiglu": SWIGLU,
            "swiglu_backward": implementation("swiglu", "swiglu_backward", _swiglu, grads=1),
            "rope": implementation("rope", "rope", _rope),
            "attention": implementation("attention", "attention", _attention),
            "attention_backward": implementation(
                "attention", "attention_backward", _attention_backward, grads=1
            ),
            "linear": composed.linear(
                LINEAR,
                LINEAR_QUANTIZED,
                composed.then_swiglu(LINEAR, SWIGLU, 2),
                composed.then_swiglu(LINEAR_QUANTIZED, SWIGLU, 7),
            ),
            "linear_backward_x": products("linear_backward_x"),
            "linear_backward_weight": products("linear_backward_weight"),
            "linear_cross_entropy": composed.linear_cross_entropy(
                implementation("cross_entropy", "linear_cross_entropy", _linear_cross_entropy),
                Implementation(
                    partial(
                        chunked,
                        linear=LINEAR_QUANTIZED.launch,
                        linear_backward_x=OPS["linear_backward_x"].eager,
                    ),
                    lambda x, *others: device_reasons(x) or rows_reasons(x=x),
                    lambda *args: "by linear, a block of rows at a time",
                ),
            ),
            "kv_append": implementation("kv_append", "kv_append", _kv_append),
        },
    )
)
