"""The figures at the end of `llama-fast generate`."""

from __future__ import annotations

import dataclasses

import torch

from ..dispatch import record_decisions
from ..distributed.tensor_parallel import share_of
from ..model import Llama
from ..nn.kv_cache import cache_dtype
from ..ops import QuantizedWeight
from ..utils.memory import resident_peak
from .terminal import size


def peak_memory(device: torch.device) -> str:
    """Returns the most memory that this process has held, and on a GPU what torch has held
    there."""
    text = size(resident_peak())
    if device.type == "cuda":
        text += f", {size(torch.cuda.max_memory_allocated(device))} on the GPU"
    return text


def weight_bytes(llama: Llama) -> int:
    quantized = [module for module in llama.modules() if isinstance(module, QuantizedWeight)]
    return sum(weight.nbytes for weight in (*llama.parameters(), *quantized))


def bytes_per_token(llama: Llama, context: float, kv_cache: str | None = None) -> float:
    """Returns the bytes that decoding a token reads: every weight, of an untied embedding one row
    alone, and the keys and values of `context` tokens, stored as `kv_cache` says. Of a model over
    ranks, those that this one reads."""
    read = weight_bytes(llama)
    if not llama.config.tied:
        weight = llama.embed.weight
        read -= weight.nbytes - weight.nbytes // weight.shape[0]
    dtype = cache_dtype(kv_cache, llama.dtype)
    share = share_of(llama)
    config = llama.config if share is None else share.part
    return read + context * config.kv_bytes_per_token(dtype)


def who_served(llama: Llama, prompt: list[int], kv_cache: str | None = None) -> str:
    """Returns which backend serves which op, in the prefill and in a step: "cpu: attention, …".

    The first layer and the head are run again on at most 32 tokens of the prompt and on one token,
    and their decisions recorded: while the text was made nothing had to be.
    """
    config = llama.config
    one_layer = Llama(dataclasses.replace(config, n_layers=1), device="meta")
    one_layer.embed, one_layer.head, one_layer.norm = llama.embed, llama.head, llama.norm
    one_layer.layers, one_layer.rope = llama.layers[:1], llama.rope
    tokens = torch.tensor([prompt[:32]], device=llama.device)
    cache = one_layer.new_cache(1, tokens.shape[1] + 1, kv_cache)
    with record_decisions() as decisions:
        one_layer(tokens, cache=cache, last_only=True)
        one_layer(tokens[:, :1], cache=cache, last_only=True)
    ops: dict[str, set[str]] = {}
    for decision in decisions:
        ops.setdefault(decision.chosen, set()).add(decision.op)
    return " · ".join(f"{backend}: {', '.join(sorted(names))}" for backend, names in ops.items())
