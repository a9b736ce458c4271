"""The attention function `llama_fast` of transformers: `attn_implementation="llama_fast"`.

Importing this module registers it, with masks as transformers makes them for SDPA: none where
causality says it all, else (B,1,T,S), true where a query sees a key. What the op cannot serve goes
to transformers' own SDPA: other masks than left padding, dropout, tensor subclasses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from .. import ops
from ..dispatch import ORDER, backends, interposed
from ..ops.attention import head_dim_reasons
from .forwards import fits, needs_gradient

NAME = "llama_fast"

# Arguments that other models give and that change what attention computes.
UNKNOWN = ("position_bias", "softcap", "s_aux", "cache", "head_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B,H,T,D), key and value (B,K,S,D), attention_mask None or (B,1,T,S) → (B,T,H,D), and
    the weights (B,H,T,S) where `output_attentions` asks for them."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    T, S = query.shape[2], key.shape[2]
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        return _with_weights(
            module, query, key, value, attention_mask, causal, scaling, dropout, **kwargs
        )
    rows = None if attention_mask is None else getattr(attention_mask, "_llama_fast_rows", None)
    if (
        not (attention_mask is None or rows is not None)
        or dropout
        or not fits(query, key, value)
        or any(kwargs.get(name) is not None for name in UNKNOWN)
        or not _served(query, key, value)
    ):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if rows is not None:
        return _attend_rows(q, k, v, rows, scaling), None
    if causal and T > 1 and S > T:
        # A static cache at its first tokens: without a mask they are the first keys, not the last.
        k, v = k[:, :T], v[:, :T]
    return ops.attention(q, k, v, causal=causal and T > 1, scale=scaling), None


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scaling: float | None) -> Tensor:
    """Rows of which each has its own first key (left padding) and all the same last one."""
    starts, end = rows
    k, v = k[:, :end], v[:, :end]
    if not any(starts):
        return ops.attention(q, k, v, scale=scaling)
    parts = [
        ops.attention(q[b : b + 1], k[b : b + 1, start:], v[b : b + 1, start:], scale=scaling)
        for b, start in enumerate(starts)
    ]
    return torch.cat(parts)


def _with_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, whose masks are numbers to add."""
    T, S = query.shape[2], key.shape[2]
    if mask is None and causal and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype is torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return eager_attention_forward(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )


def _served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel computes it, and its gradient where one will be needed."""
    if head_dim_reasons(query.shape[-1]):
        return False
    names = ("attention",)
    if needs_gradient(query, key, value):
        names = ("attention", "attention_backward")
    return all((name, query.device.type) in KERNELS for name in names)


def _kernels() -> set[tuple[str, str]]:
    """The ops of attention that have a kernel here, with the type of its device."""
    return {
        (op, device)
        for op in ("attention", "attention_backward")
        for device, order in ORDER.items()
        for name in order
        if name in backends()
        and not backends()[name].unavailable
        and op in backends()[name].implementations
    }


KERNELS = _kernels()

# The first key of each row, and the number behind the last one.
Rows = tuple[list[int], int]


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA. Where it is causality and left padding alone, it also carries
    what the op needs to know of it, so that each layer need not find that out anew."""
    made = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    if made is not None and not args and not interposed():
        rows = _rows(**kwargs)
        if rows is not None:
            made._llama_fast_rows = rows
    return made


def _rows(
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Rows | None:
    """Each row's first key and the end of all, where the queries are the last tokens of rows that
    are padded on the left; None otherwise. `cache_position` is given by transformers before 5."""
    if mask_function is not causal_mask_function or kv_offset or local_size is not None:
        return None
    if cache_position is not None:
        if len(cache_position) > 1 and not (cache_position.diff() == 1).all():
            return None
        end = int(cache_position[-1]) + 1
    else:
        end = int(q_offset) + q_length
    if end > kv_length:
        return None
    if attention_mask is None:
        return [0] * kwargs.get("batch_size", 1), end
    if attention_mask.ndim != 2 or attention_mask.shape[1] < end:
        return None
    tokens = attention_mask[:, :end].bool()
    starts = end - tokens.sum(1)
    padding = torch.arange(end, device=tokens.device) < starts[:, None]
    return None if (padding == tokens).any() else (starts.tolist(), end)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
