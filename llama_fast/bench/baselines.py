"""Who is timed beside our backends: eager, torch.compile, torch's own function, other libraries.

A baseline is a name and, for an op, a function of the op's own arguments that returns the op's own
outputs, laid out as that library likes them: turning a result back into the op's layout is a view.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import BACKENDS, OPS, Op, nothing, use_backend
from ..errors import BackendError

COMPILED = "torch.compile"

Call = Callable[..., Any]


# --- torch's own --------------------------------------------------------------------------------


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _sdpa(kind: str | None, q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    """Its mask is aligned at the first key, so a prompt that others precede has none here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            *heads_first,
            is_causal=causal and q.shape[1] > 1,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return o.transpose(1, 2)

    if kind is None:
        return run()
    with sdpa_kernel(getattr(SDPBackend, kind)):
        return run()


def _torch_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, *_: Any
) -> Tensor:
    loss = F.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index)
    return loss.float()


# --- libraries ----------------------------------------------------------------------------------


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    tables = (torch.cat((table, table), -1)[None] for table in (cos, sin))
    # It writes what it is given, and an op never does.
    q, k = (x.transpose(1, 2).clone() for x in (q, k))
    return tuple(x.transpose(1, 2) for x in LigerRopeFunction.apply(q, k, *tables))


def _liger_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, *_: Any
) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, None, None, ignore_index)
    return found[0] if isinstance(found, tuple) else found


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def _flashinfer_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    import flashinfer

    return flashinfer.norm.rmsnorm(x.flatten(0, -2), weight, eps).view(x.shape)


def _flashinfer_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """It takes both halves as one tensor, which they are in this model."""
    import flashinfer

    both = gate.as_strided((*gate.shape[:-1], 2 * gate.shape[-1]), gate.stride())
    return flashinfer.activation.silu_and_mul(both)


def _flashinfer_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    import flashinfer

    if q.shape[1] == 1:
        o = flashinfer.single_decode_with_kv_cache(q[0, 0], k[0], v[0], kv_layout="NHD")
        return o[None, None]
    o = flashinfer.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=causal, kv_layout="NHD")
    return o[None]


def _whole_logits(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    reduction: str,
    row_weights: Tensor | None,
    *form: Any,
) -> Tensor:
    logits = OPS["linear"].eager(x, weight, *form)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


# What a user would compile, where the eager reference makes its own gradients.
_WRITTEN_OUT: dict[str, Call] = {"linear_cross_entropy": _whole_logits}

# Baselines besides the backends and torch.compile, and the ops that each has in one function.
TORCH: dict[str, dict[str, Call]] = {
    "torch": {
        "rms_norm": _torch_rms_norm,
        "attention": partial(_sdpa, None),
        "linear_cross_entropy": _torch_linear_cross_entropy,
    },
    # Each of SDPA's ways by itself, where torch alone would take the first that serves.
    "torch cudnn": {"attention": partial(_sdpa, "CUDNN_ATTENTION")},
    "torch flash": {"attention": partial(_sdpa, "FLASH_ATTENTION")},
    "torch efficient": {"attention": partial(_sdpa, "EFFICIENT_ATTENTION")},
    "torch math": {"attention": partial(_sdpa, "MATH")},
}
LIBRARIES: dict[str, dict[str, Call]] = {
    "liger-kernel": {
        "rms_norm": _liger_rms_norm,
        "add_rms_norm": _liger_add_rms_norm,
        "swiglu": _liger_swiglu,
        "rope": _liger_rope,
        "linear_cross_entropy": _liger_linear_cross_entropy,
    },
    "flash-attn": {"attention": _flash_attn},
    "flashinfer": {
        "rms_norm": _flashinfer_rms_norm,
        "swiglu": _flashinfer_swiglu,
        "attention": _flashinfer_attention,
    },
}
MODULES = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn", "flashinfer": "flashinfer"}
PEERS = (*TORCH, COMPILED, *LIBRARIES)
_FUNCTIONS = {**TORCH, **LIBRARIES}
# Those of SDPA's ways that a CPU has; torch alone takes the first of them that serves.
_ON_GPUS = ("torch cudnn", "torch efficient")
_FORWARD_ONLY = ("flashinfer",)


def peers(op: Op) -> list[str]:
    """Who has this op besides our backends, wherever it may run."""
    return [name for name in PEERS if name == COMPILED or op.name in _FUNCTIONS[name]]


def why_not(name: str, op: Op, args: tuple, *, gradient: bool = False) -> list[str]:
    """Why a baseline cannot be timed on this call, in sentences; nothing where it can.

    gradient  its backward pass, too
    Raises BackendError for a name that is no baseline.
    """
    if gradient and not op.has_gradient(*args):
        return [f"{op.label(*args)} has no gradient"]
    if name in BACKENDS:
        with use_backend(name):
            return op.explain(*args).reasons[name]
    if name not in PEERS:
        raise BackendError(
            f"no baseline is named {name!r}; there are {', '.join((*BACKENDS, *PEERS))}"
        )
    if name != COMPILED and op.name not in _FUNCTIONS[name]:
        return [f"{name} has no {op.name} in one function"]
    if name != COMPILED and (variant := op.label(*args).partition(" ")[2]):
        return [f"{name} has no {op.name} {variant} in one function"]
    module, device = MODULES.get(name), args[0].device
    if module is not None and importlib.util.find_spec(module) is None:
        return [f"{name} is not installed"]
    if device.type != "cuda" and (name in LIBRARIES or name in _ON_GPUS):
        return [f"{name} needs a GPU, and the tensors are on {device}"]
    if gradient and name in _FORWARD_ONLY:
        return [f"{name} has no gradient"]
    return _OTHER_LIMITS.get(op.name, nothing)(name, *args)


def _attention_limits(
    name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Any, lengths: Any, *_: Any
) -> list[str]:
    if name == COMPILED:
        return []
    T, S = q.shape[1], k.shape[1]
    reasons = []
    if lengths is not None and bool((lengths != S).any()):
        reasons.append(f"{name} is asked for no lengths here, and they are not all {S}")
    if name in TORCH and causal and 1 < T != S:
        reasons.append(f"SDPA's causal mask is aligned at the first key, and {T} queries see {S}")
    if name == "flashinfer" and q.shape[0] != 1:
        reasons.append("flashinfer's functions for one sequence serve no batch")
    if name in LIBRARIES and q.dtype is torch.float32:
        reasons.append(f"{name} takes half types alone")
    return reasons


def _linear_cross_entropy_limits(name: str, *args: Any) -> list[str]:
    if name == "torch" and not hasattr(F, "linear_cross_entropy"):
        return [f"torch {torch.__version__} has no linear_cross_entropy"]
    return []


_OTHER_LIMITS: dict[str, Callable[..., list[str]]] = {
    "attention": _attention_limits,
    "linear_cross_entropy": _linear_cross_entropy_limits,
}


def call(name: str, op: Op) -> Call:
    """The baseline's function of the op's arguments. Our backends run strictly, and raise
    BackendError for what they cannot serve."""
    if name in BACKENDS:

        def run(*args: Any) -> Any:
            with use_backend(name, strict=True):
                return op(*args)

        return run
    if name == COMPILED:
        torch.compiler.reset()  # or it would stop compiling after a few shapes of one function
        return torch.compile(_WRITTEN_OUT.get(op.name, op.eager), dynamic=False)
    return _FUNCTIONS[name][op.name]
