"""Direct preference optimisation: a model learns to prefer the chosen of two answers.

    m = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))
    loss = -(1 - s) log σ(β m) - s log σ(-β m)           mean over the pairs of a step

Rafailov et al., "Direct Preference Optimization" (2023); the label smoothing s, for preferences of
which a share s is the wrong way round, is Mitchell's conservative DPO. p is the model that is
trained and p_ref the one it began as, log p(answer) the sum over the answer's tokens. With an
adapter p_ref is the model with the adapter off, so it costs no memory; else its log-probabilities
are made once, before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..distributed import Processes
from ..errors import ConfigError, LlamaFastError
from ..model import Llama
from .adapter import Adapter
from .config import TrainConfig
from .evaluation import Measured, held_out_batches, mode
from .loop import finetune
from .reference import WithReference, log_probabilities, with_reference
from .state import History


@dataclass(frozen=True)
class PreferenceEvaluation(Measured):
    """loss in nats a pair; reward_margin: the mean of β m; accuracy: the share of pairs whose
    chosen answer has gained more than the rejected one."""

    loss: float
    reward_margin: float
    accuracy: float
    pairs: int


class DPO:
    """The objective: `loop.finetune` minimises it.

    beta             how far the model may go from the reference: the less, the farther
    label_smoothing  s, from 0 to below 0.5
    adapter          what is off in the reference; None: batches carry `reference`
    Raises ConfigError for values that cannot be.
    """

    measures = ("reward_margin", "accuracy", "chosen_reward")
    judged = ("loss", "reward_margin", "accuracy")
    unit = "nats per pair"

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, adapter: Adapter | None = None
    ) -> None:
        if not 0 < beta < math.inf:
            raise ConfigError(f"beta is {beta}; it must be above 0, usually 0.1")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing is {label_smoothing}; it must be from 0 to below 0.5: it is the "
                "share of pairs that prefer the wrong answer"
            )
        self.beta, self.label_smoothing, self.adapter = beta, label_smoothing, adapter

    def identity(self) -> dict[str, Any]:
        reference = "made before" if self.adapter is None else "adapter off"
        return {
            "kind": "dpo",
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "reference": reference,
        }

    def count(self, batch: Any) -> int:
        return (len(batch.cu_seqlens) - 1) // 2

    def loss(self, model: Llama, batch: Any) -> tuple[Tensor, Tensor]:
        reference = self._reference(model, batch)
        rewards = self.beta * (log_probabilities(model, batch) - reference)  # (P,2)
        chosen, margin = rewards[:, 0], rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.label_smoothing) * logsigmoid(margin)
        if self.label_smoothing:
            losses = losses - self.label_smoothing * logsigmoid(-margin)
        measures = margin.detach(), (margin.detach() > 0).to(margin.dtype), chosen.detach()
        return losses.sum(), torch.stack([measure.sum() for measure in measures])

    @torch.no_grad()
    def _reference(self, model: Llama, batch: Any) -> Tensor:
        if batch.reference is not None:
            return batch.reference
        if self.adapter is None:
            raise ConfigError(
                "DPO without an adapter needs the first model's log-probabilities: give the data "
                "by with_reference(model, data), or call finetune_dpo, which makes them"
            )
        with self.adapter.disabled():
            return log_probabilities(model, batch)

    @torch.no_grad()
    def evaluate(self, model: Llama, data: Any, batch_size: int) -> PreferenceEvaluation:
        processes = Processes()
        total, sums, pairs = 0.0, [0.0, 0.0], 0
        with mode(model, training=False):
            for batch, own in held_out_batches(data, batch_size, processes):
                loss, found = self.loss(model, batch.to(model.device))
                if not own:
                    continue
                total, pairs = total + float(loss), pairs + self.count(batch)
                sums = [a + b for a, b in zip(sums, found.tolist()[:2], strict=True)]
        total, *sums, pairs = processes.sum((total, *sums, pairs), model.device)
        if not pairs:
            raise LlamaFastError("the held-out data has no pairs to judge by; give some")
        return PreferenceEvaluation(total / pairs, sums[0] / pairs, sums[1] / pairs, int(pairs))


def finetune_dpo(
    model: Llama,
    data: Any,
    config: TrainConfig,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    adapter: Adapter | None = None,
    held_out: Any | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    sample: Callable[[], str] | None = None,
) -> History:
    """Trains `model` in place to prefer the chosen answers and returns what was recorded: as
    `finetune`, and of each step reward_margin, accuracy and chosen_reward too, means over its
    pairs.

    data, held_out   what `read_pairs` makes; rows of `config` are packed rows, of whole pairs
    adapter          what is trained, and is off in the reference; None: all weights. Then the
                     reference's log-probabilities are made of the model as it is given, before the
                     first step, and kept in `folder`; a run that goes on must be given that model

    A step's loss is the mean over all its pairs, however it is cut into micro-batches. Raises what
    `finetune` does, and ConfigError for a beta or a label smoothing that cannot be.
    """
    objective = DPO(beta, label_smoothing, adapter)
    if adapter is None:
        kept = None if folder is None else Path(folder)
        data, held_out = (
            given
            if given is None or isinstance(given, WithReference)
            else with_reference(model, given, kept, progress=progress)
            for given in (data, held_out)
        )
    return finetune(
        model,
        data,
        config,
        held_out=held_out,
        folder=folder,
        adapter=adapter,
        progress=progress,
        sample=sample,
        objective=objective,
    )
