"""Our attention in the place of torch's flash attention, for any model.

    import llama_fast.engines.torch_attention  # registers the name
    torch.nn.attention.activate_flash_attention_impl("llama_fast")
    torch.nn.attention.restore_flash_attention_impl()  # torch's own kernels again

While it is active, it has the kernels of torch's flash attention operators: those which
`F.scaled_dot_product_attention` calls where torch chooses flash attention, and those of
`varlen_attn` (torch_varlen.py), forward and backward. Autograd, autocast, fake tensors and
torch.compile lie above the kernels and stay torch's. A call that the op cannot serve goes to the
kernel that was there before.

Heads come as (B, H, T, D), which the op reads as the transposed view (B, T, H, D). Results have the
strides of torch's kernels, since compiled graphs rely on them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..ops.attention import BACKWARD, OP
from . import NAME, torch_varlen
from .torch_kernels import TorchKernel, for_backward, unsupported

try:
    from torch.nn.attention import register_flash_attention_impl
except ImportError as error:
    raise ImportError(
        "llama_fast.engines.torch_attention needs torch 2.13 or newer, in which flash attention "
        f"can be replaced; this is torch {torch.__version__}: use llama_fast.patch(model) instead"
    ) from error


@dataclass
class Active:
    """Keeps our kernels registered until it is removed."""

    library: Library | None

    def remove(self) -> None:
        self.library = None  # which takes back all that was registered through it


def register() -> Active:
    """Gives torch's operators our kernels; `activate_flash_attention_impl` calls it."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*[Oo]verriding a previously registered kernel")
        for device in ("CPU", "CUDA"):
            if device == "CUDA" and not torch.backends.cuda.is_built():
                continue
            for operator, kernel in {**KERNELS[device], **torch_varlen.KERNELS}.items():
                ours = partial(kernel, TorchKernel(operator, device))
                library.impl(operator, ours, device, with_keyset=True)
    return Active(library)


def cpu_forward(
    torch_kernel: TorchKernel,
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns o (B,H,T,D) and lse (B,H,T)."""
    reasons = _cpu_unsupported("attention", query, key, value, dropout_p, is_causal, attn_mask)
    if reasons:
        args = query, key, value, dropout_p, is_causal
        return torch_kernel(keyset, reasons, *args, attn_mask=attn_mask, scale=scale)
    q, k, v = _heads_third(query, *_seen(query, key, value, is_causal))
    with torch.no_grad():
        o, lse = OP(q, k, v, is_causal, scale, None, True)
    lse = lse.to(torch.float32).transpose(1, 2).contiguous().transpose(1, 2)
    return _as_strided_like(query, o.transpose(1, 2)), lse


def cpu_backward(
    torch_kernel: TorchKernel,
    keyset: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    reasons = _cpu_unsupported(
        "attention_backward", query, key, value, dropout_p, is_causal, attn_mask
    )
    if reasons:
        args = grad_out, query, key, value, out, logsumexp, dropout_p, is_causal
        return torch_kernel(keyset, reasons, *args, attn_mask=attn_mask, scale=scale)
    seen = _seen(query, key, value, is_causal)
    g, q, k, v, o = _heads_third(grad_out, query, *seen, out)
    with torch.no_grad():
        found = BACKWARD(g, q, k, v, o, for_backward(logsumexp, q), is_causal, scale, None)
    dq, dk, dv = _heads_third(*found)
    return dq, _with_unseen(key, dk), _with_unseen(value, dv)


def cuda_forward(
    torch_kernel: TorchKernel,
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple:
    """Returns o (B,H,T,D), lse (B,H,T), and what belongs to documents and to dropout, of which
    there are none. Causal queries are the last of the keys, as in the op."""
    reasons = unsupported("attention", query, key, value, dropout_p, return_debug_mask)
    if reasons:
        args = query, key, value, dropout_p, is_causal, return_debug_mask
        return torch_kernel(keyset, reasons, *args, scale=scale)
    with torch.no_grad():
        o, lse = OP(*_heads_third(query, key, value), is_causal, scale, None, True)
    sizes = None, None, query.shape[2], key.shape[2]
    out = _as_strided_like(query, o.transpose(1, 2))
    return out, lse.to(torch.float32), *sizes, *torch_varlen.without_dropout(query)


def cuda_backward(
    torch_kernel: TorchKernel,
    keyset: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    reasons = unsupported("attention_backward", query, key, value, dropout_p)
    if reasons:
        args = grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k
        dropout = philox_seed, philox_offset
        return torch_kernel(keyset, reasons, *args, dropout_p, is_causal, *dropout, scale=scale)
    g, q, k, v, o = _heads_third(grad_out, query, key, value, out)
    with torch.no_grad():
        found = BACKWARD(g, q, k, v, o, for_backward(logsumexp, q), is_causal, scale, None)
    inputs = query, key, value
    return tuple(map(_as_strided_like, inputs, _heads_third(*found)))


KERNELS = {
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": cpu_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": cpu_backward,
    },
    "CUDA": {
        "_scaled_dot_product_flash_attention": cuda_forward,
        "_scaled_dot_product_flash_attention_backward": cuda_backward,
    },
}


def _cpu_unsupported(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
) -> list[str]:
    reasons = unsupported(op, query, key, value, dropout_p)
    if attn_mask is not None:
        reasons.append("there is a mask")
    if is_causal and query.shape[2] > key.shape[2]:
        reasons.append("causal queries behind the last key see all keys")
    return reasons


def _seen(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The keys and values that any query sees. torch's causality on the CPU is aligned at the first
    key, the op's at the last: without the keys behind the last query they are one."""
    if is_causal and key.shape[2] > query.shape[2]:
        T = query.shape[2]
        return key[:, :, :T], value[:, :, :T]
    return key, value


def _with_unseen(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of all keys or values: zeros where no query sees them."""
    unseen = x.shape[2] - gradient.shape[2]
    if not unseen:
        return gradient
    gradient = gradient.transpose(1, 2)
    zeros = gradient.new_zeros(gradient.shape[0], unseen, *gradient.shape[2:])
    return torch.cat((gradient, zeros), 1).transpose(1, 2)


def _heads_third(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, T, D) as (B, T, H, D), or back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _as_strided_like(x: Tensor, result: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return result if result.stride() == out.stride() else out.copy_(result)


register_flash_attention_impl(NAME, register_fn=register)
