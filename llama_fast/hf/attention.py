"""Our attention in transformers models: as `attn_implementation="llama_fast"`, and in `patch`.

Importing this module registers it by that name, with masks as transformers makes them for SDPA:
none where causality says it all, else (B,1,T,S), true where a query sees a key. What the op cannot
serve goes to the function that would have been called without it: other masks than left padding,
dropout, tensor subclasses, arguments that this file does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

from .. import ops
from ..dispatch import kernels, needs_dispatcher
from ..ops.attention_checks import head_dim_reasons
from . import paged
from .conditions import fits, is_learnt, needs_gradient

NAME = "llama_fast"
# The attention functions in whose place `patch` puts ours: their masks can be read.
REPLACED = ("sdpa", "eager")
# Arguments that change nothing in what attention computes, or that its mask holds already.
HARMLESS = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}
# The first key of each row, and the number behind the last one.
Rows = tuple[list[int], int]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def own_function(module: nn.Module) -> Attend:
    """The attention function that the module's config names."""
    name = module.config._attn_implementation
    if name in (None, "eager"):
        return _eager(module)
    get = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", None)  # since transformers 5
    return get(name, _eager(module)) if get else ALL_ATTENTION_FUNCTIONS[name]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B,H,T,D), key and value (B,K,S,D), attention_mask None or (B,1,T,S) → (B,T,H,D), and
    the weights (B,H,T,S) where `output_attentions` asks for them."""
    return attend(_other, module, query, key, value, attention_mask, **kwargs)


def attend(
    other: Attend,
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
    """As `attention`, with the function that serves what the op cannot."""
    rows = None
    pages = paged.is_paged(kwargs) and paged.served(query, kwargs)
    known = HARMLESS | paged.ARGUMENTS if pages else HARMLESS
    if (
        dropout
        or is_learnt(scaling)
        or any(arg is not None for name, arg in kwargs.items() if name not in known)
        or _wants_weights(module, kwargs)
        or not fits(query, key, value)
        or key.shape != value.shape
        or not _served(query, key, value)
        or (
            attention_mask is not None
            and not pages
            and (rows := _rows(attention_mask, query, key)) is None
        )
    ):
        given = kwargs if is_causal is None else {**kwargs, "is_causal": is_causal}
        return other(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )
    if pages:
        return paged.attend_paged(module, query, key, value, scaling, kwargs), None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if rows is not None:
        return _attend_rows(q, k, v, rows, scaling), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    T, S = q.shape[1], k.shape[1]
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


def _other(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What serves a model whose config names this package, where the op cannot: SDPA; or, for the
    weights and for arguments that SDPA does not take either, the eager function of the model's own
    file."""
    known = {*HARMLESS, "dropout", "scaling", "is_causal"}
    unknown = any(arg is not None for name, arg in kwargs.items() if name not in known)
    if not unknown and not _wants_weights(module, kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    T, S = query.shape[2], key.shape[2]
    is_causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype is torch.bool:  # eager masks are numbers to add
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    return _eager(module)(module, query, key, value, mask, **kwargs)


def _eager(module: nn.Module) -> Attend:
    """The eager attention of the file that defines the module: models differ in it."""
    file = sys.modules.get(type(module).__module__)
    return getattr(file, "eager_attention_forward", modeling_llama.eager_attention_forward)


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    config = getattr(module, "config", None)
    asked = kwargs.get("output_attentions")
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


def _served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel computes it, and its gradient where one will be needed."""
    if head_dim_reasons(query.shape[-1]):
        return False
    names = ("attention",)
    if needs_gradient(query, key, value):
        names = ("attention", "attention_backward")
    return all((name, query.device.type) in KERNELS for name in names)


# The ops that have a kernel here, with the type of its device.
KERNELS = kernels()


def _rows(mask: Tensor, query: Tensor, key: Tensor) -> Rows | None:
    """Each row's first key and the end of all, where the mask says no more than causality and left
    padding; None otherwise. Kept on the mask, which all layers share, as long as nobody writes to
    it."""
    if needs_dispatcher() or type(mask) is not Tensor or mask.requires_grad:
        return None
    # A tensor made in inference mode does not count its changes.
    version = None if mask.is_inference() else mask._version
    kept = getattr(mask, "_llama_fast_rows", None)
    if kept is not None and version is not None and kept[0] == version:
        return kept[1]
    rows = _read(mask, query.shape[0], query.shape[2], key.shape[2])
    mask._llama_fast_rows = (version, rows)
    return rows


def _read(mask: Tensor, B: int, T: int, S: int) -> Rows | None:
    """As `_rows`, from the mask's values: true, or a number to add of 0, where a key is seen."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, B) or mask.shape[2] != T:
        return None
    if mask.dtype is torch.bool:
        seen = mask[:, 0]
    else:
        seen = mask[:, 0] == 0
        lowest = torch.finfo(mask.dtype).min
        if not (seen | (mask[:, 0] <= lowest)).all():
            return None
    if seen.shape[2] != S:
        return None
    keys = torch.arange(S, device=mask.device)
    last = seen[:, -1]  # (B,S)
    counts = last.sum(1)
    starts = torch.where(last, keys, S).amin(1)
    ends = starts + counts
    end = int(ends[0])
    if not (counts > 0).all() or not (ends == end).all():
        return None
    position = torch.arange(end - T, end, device=mask.device)[:, None]  # (T,1)
    expected = (keys >= starts[:, None, None]) & (keys <= position)  # (B,T,S)
    # Queries before a row's first key are padding, of which no result is used, only where they see
    # nothing, or everything, as transformers has it for SDPA. Otherwise documents are kept apart.
    padding = position[None] < starts[:, None, None]
    padding &= (~seen).all(2, keepdim=True) | seen.all(2, keepdim=True)
    if not ((seen == expected) | padding).all():
        return None
    return starts.tolist() * (B // len(starts)), end


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
