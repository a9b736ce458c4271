"""How well a model predicts texts: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed import Processes
from ..distributed.fully_sharded import settle
from ..errors import LlamaFastError

# What evaluations and steps record, as text.
MEASURES = {
    "loss": "loss {:.3f}",
    "perplexity": "perplexity {:.4g}",
    "bits_per_byte": "{:.3f} bits per byte",
    "reward_margin": "reward margin {:.3f}",
    "accuracy": "accuracy {:.1%}",
}


def measures_text(record: Mapping[str, Any]) -> str:
    """Returns the measures of a record as text; those that are not known are left out."""
    return ", ".join(
        text.format(record[name]) for name, text in MEASURES.items() if record.get(name) is not None
    )


class Measured:
    """What a dataclass of measures gives the history and the screen; its counts are no measures."""

    def __str__(self) -> str:
        return measures_text(vars(self))

    def record(self, step: int) -> dict[str, float | None]:
        return {"step": step, **{name: x for name, x in vars(self).items() if name in MEASURES}}


@dataclass(frozen=True)
class Evaluation(Measured):
    """loss in nats per trained token; perplexity e^loss; bits_per_byte: the same loss in bits for
    each byte of the targets' text, which alone compares models of different vocabularies (None
    where the bytes are not known)."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, batch_size: int = 8) -> Evaluation:
    """Returns the loss over all targets of `data`, each with the same weight, in evaluation mode.

    Of several processes each takes its part, and all must call it. Raises LlamaFastError where no
    token is a target.
    """
    processes = Processes()
    total, kept, n_bytes = 0.0, 0, 0
    with mode(model, training=False):
        for batch, own in held_out_batches(data, batch_size, processes):
            batch = batch.to(model.device)
            loss = model.loss(
                batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum"
            )
            if own:
                total, kept = total + float(loss), kept + batch.kept
                n_bytes += batch.n_bytes
    total, kept, n_bytes = processes.sum((total, kept, n_bytes), model.device)
    kept, n_bytes = int(kept), int(n_bytes)
    if not kept:
        raise LlamaFastError(
            "no token of the held-out data is a target, so there is nothing to judge by; look at "
            "it with data.show(3)"
        )
    loss = total / kept
    bits = total / math.log(2) / n_bytes if n_bytes else None
    return Evaluation(loss, math.exp(min(loss, 700)), bits, kept)


def held_out_batches(
    data: Any, batch_size: int, processes: Processes
) -> Iterator[tuple[Any, bool]]:
    """Yields this process's part of the data, `batch_size` rows at a time, in their order; with
    False what is another's (`Processes.turns`)."""
    for start, own in processes.turns(range(0, len(data), batch_size)):
        yield data.batch(range(start, min(start + batch_size, len(data)))), own


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside the block the model is in training mode, or in that of evaluation. Behind it nothing
    stays gathered of one that is fully sharded, so it holds no weights from before an update."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
        settle(model)
