"""Our attention in transformers' continuous batching: `generate_batch` and `transformers serve`.

There a step is one row of tokens, of sequences one behind another, and the module's attention
function puts keys and values into a paged cache, which gives back those of all sequences. Causality
lies in the sequences' lengths; the mask of all queries and all keys says the same. On the CPU
alone: a GPU would be waited for to read the lengths.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..dispatch import needs_dispatcher
from ..ops.attention_varlen import Keys, attend

try:
    from transformers.generation.continuous_batching import PagedAttentionCache
except ImportError:  # before transformers 4.52
    PagedAttentionCache = None

# Newer transformers give the cache what belongs to a step in one dict; older ones had functions of
# other names for it, which ours does not stand in for.
KNOWN = PagedAttentionCache is not None and any(
    parameter.name == "kwargs" and parameter.kind is not parameter.VAR_KEYWORD
    for parameter in inspect.signature(PagedAttentionCache.update).parameters.values()
)
# The name that continuous batching gives to a model whose config asks for "eager".
EAGER = "paged|eager"
# What attention functions are given by continuous batching, besides what changes nothing.
ARGUMENTS = {
    "block_table",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "read_index",
    "write_index",
}


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of a step of continuous batching, as this file knows it."""
    return KNOWN and isinstance(kwargs.get("cache"), PagedAttentionCache)


def served(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the lengths say all, and can be read."""
    return (
        query.is_cpu
        and query.shape[0] == 1
        and not needs_dispatcher()
        and kwargs.get("sliding_window") is None
        and kwargs.get("block_table") is None
    )


def attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """query (1,H,T,D), key and value (1,K,T,D) → (1,T,H,D)."""
    step = dict(kwargs)
    cache = step.pop("cache")
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=step
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # The cache has put the layer's own lengths of the keys in the place of all layers'.
    cum_q, keys = step["cu_seq_lens_q"], Keys(step["cu_seq_lens_k"])
    return attend(q, k, v, cum_q, keys, scale=scaling)[0][None]
