"""Activation checkpointing of each block: its activations are computed anew in the backward pass.

All but attention's output, which is kept: attention is the one op of a block whose cost grows with
the square of the length, and its output is as small as the residual stream. So the backward pass
pays for the matrix products again, and not for attention. The bits are those of a pass without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block, the layers of a `Llama` keep their input and attention's output alone."""
    kept = {torch.ops.llama_fast.attention.default}

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = function in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def run(forward: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)

    layers = list(model.layers)
    before = [vars(layer).get("forward") for layer in layers]  # a function in the class's place
    for layer in layers:
        layer.forward = partial(run, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
