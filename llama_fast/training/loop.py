"""The training loop: pre-training, full fine-tuning and adapters, saved and resumed to the bit.

    for each step:  n = trained tokens of all its micro-batches
                    for each micro-batch:  (Σ loss of its tokens / n).backward()
                    clip, AdamW

Of several processes (`distributed`) each computes its part of a step's rows: n, the loss and the
gradients are sums over all of them. Each has the whole model, or a part of a fully sharded one.
Other objectives than the next token (`objective`, `dpo`) count other terms than tokens.

So the loss of a step, and its gradient, are those of one large batch, however it is cut and however
the trained tokens are spread over it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..distributed import Processes, is_fully_sharded
from ..errors import ConfigError, LlamaFastError, ProcessError
from ..model import Llama
from ..ops.random_bits import seed_of
from .adapter import Adapter
from .checkpointing import activation_checkpointing
from .config import RowsOfSteps, TrainConfig
from .evaluation import mode
from .objective import Judged, NextToken, Objective
from .optim import step_in_backward
from .progress import TrainingProgress
from .record import Record
from .state import History, StateFile, peak_memory, random_state, set_random_state
from .weights import Weights


def finetune(
    model: Llama,
    data: Any,
    config: TrainConfig,
    *,
    held_out: Any | None = None,
    folder: str | Path | None = None,
    adapter: Adapter | None = None,
    progress: bool = True,
    sample: Callable[[], str] | None = None,
    objective: Objective | None = None,
) -> History:
    """Trains `model` in place and returns what was recorded.

    data, held_out   what `read` makes, or a `PackedDataset`
    adapter          what is trained; None: all weights that ask for a gradient. A fully sharded
                     model (`distributed.fully_shard`) stays so, and each process has all of the
                     adapter
    folder           where the state (training.pt) and the table of steps (log.csv) are kept. If a
                     state is there the training goes on from it, and ends with bit for bit the
                     weights and the history that it would have had without the interruption (on the
                     same machine with the same number of threads, from the same first weights)
    sample           is called at each evaluation; the text that it returns is shown
    objective        what is minimised; None: the cross entropy of the next token

    Raises CheckpointError if that state is damaged or of another training, or cannot be written;
    LlamaFastError for data without rows or without targets, and when the loss is no longer finite.
    Then the last saved state is as it was.
    """
    objective = NextToken() if objective is None else objective
    parts = model, data, config, held_out, folder, adapter, sample, objective
    return _Training(*parts).run(progress)


class _Training:
    def __init__(
        self,
        model: Llama,
        data: Any,
        config: TrainConfig,
        held_out: Any | None,
        folder: str | Path | None,
        adapter: Adapter | None,
        sample: Callable[[], str] | None,
        objective: Objective,
    ) -> None:
        for name, given in (("training", data), ("held-out", held_out)):
            if given is not None and not len(given):
                raise LlamaFastError(f"the {name} data has no rows; give more text, or other files")
        if adapter is not None and not (adapter.enabled and adapter.model is model):
            raise ConfigError(
                f"the adapter {adapter.name!r} is disabled, or on another model; call "
                "adapter.enable() on the one that is on this model"
            )
        self.model, self.data, self.config = model, data, config
        self.held_out, self.sample, self.objective = held_out, sample, objective
        self.folder = None if folder is None else Path(folder)
        self.rows = RowsOfSteps(data, config)
        self.steps = config.steps_of(len(data))
        self.processes = Processes()
        if self.processes.size > 1 and config.step_in_backward:
            raise ConfigError(
                "step_in_backward updates a weight before the gradients of other processes are "
                "known; leave it out where there are several"
            )
        self.device = model.device
        named = model.named_parameters() if adapter is None else adapter.named_parameters()
        self.weights = Weights({name: w for name, w in named if w.requires_grad}, config)
        self.file = None if folder is None else StateFile(folder, self._identity(adapter))
        self.history = History()

    def _identity(self, adapter: Adapter | None) -> dict[str, Any]:
        """What decides the bits of the result, besides the first weights."""
        settings = dataclasses.asdict(self.config)
        for name in ("eval_every", "save_every"):
            del settings[name]
        held_out = None if self.held_out is None else self.held_out.fingerprint()
        identity = {
            "settings": settings | {"eval_every": self.config.eval_every},
            "model": dataclasses.asdict(self.model.config) | {"dtype": str(self.model.dtype)},
            "adapter": None if adapter is None else dataclasses.asdict(adapter.config),
            "data": self.data.fingerprint(),
            "held-out data": held_out,
        }
        objective = self.objective.identity()
        return identity if objective is None else identity | {"objective": objective}

    def run(self, progress: bool) -> History:
        before = random_state(self.device)
        try:
            with mode(self.model, training=True):
                torch.manual_seed(self.config.seed)
                self._run(progress)
        finally:
            set_random_state(before)
            self.weights.forget_gradients()
        return self.history

    def _run(self, progress: bool) -> None:
        first, saved = 0, None if self.file is None else self.file.load(self.weights)
        if saved is not None:
            first, self.history = saved
        self._agree(first)
        main = self.processes.main
        with (
            Record(self.folder if main else None, self.history, *self._names()) as record,
            TrainingProgress(self.steps, first, shown=progress and main) as shown,
            self._stepping(),
        ):
            if not first:
                self._evaluate(0)
            for step in range(first, self.steps):
                started = time.perf_counter()
                found = self._step(step)
                seconds = time.perf_counter() - started
                self.history.train.append(found)
                self.history.seconds.append(seconds)
                self.history.peak_bytes.append(peak_memory(self.device))
                done, last = step + 1, step + 1 == self.steps
                judged = None
                if _due(done, self.config.eval_every, last):
                    judged = self._evaluate(done)
                    shown.evaluated(done, found["loss"], judged, self._sampled())
                record.add(done, judged is not None)
                if self.file is not None and _due(done, self.config.save_every, last):
                    self.file.save(done, self.history, self.weights, self.device)
                shown.stepped(done, found, seconds)

    def _agree(self, first: int) -> None:
        """All processes begin with the same step and, of what is trained, with the same bits."""
        processes = self.processes
        found = processes.gather(first)
        if len(set(found)) > 1:
            raise ProcessError(
                f"the processes found states of different steps in {self.folder}: {found}, by "
                "their ranks; give a folder that all of them see, on every machine"
            )
        if not self.weights.cut:
            processes.broadcast(self.weights.named.values())
            processes.broadcast(self.weights.masters.values())

    def _names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.objective.measures, self.objective.judged

    def _stepping(self) -> AbstractContextManager[Any]:
        if not self.config.step_in_backward:
            return nullcontext()
        return step_in_backward(self.model, self.weights.optimizer)

    def _step(self, step: int) -> dict[str, float | None]:
        processes = self.processes
        batches = [
            (self.data.batch(rows), own)
            for rows, own in self.rows.turns(step, processes.rank, processes.size)
        ]
        counted = [batch for batch, own in batches if own]
        counts = (
            sum(batch.tokens.numel() for batch in counted),
            sum(batch.kept for batch in counted),
            sum(map(self.objective.count, counted)),
        )
        tokens, kept, count = map(int, processes.sum(counts, self.device))
        if processes.size > 1:  # other dropout in each, whatever was drawn before
            torch.manual_seed(seed_of(self.config.seed, step, processes.rank))
        if not count:
            raise LlamaFastError(
                f"step {step + 1}: no token of its rows is a target, all are masked, so there is "
                "nothing to learn from them; look at the rows with data.show(3), and at train_on"
            )
        scale = self.config.scale_at(step, self.steps)
        self.weights.set_rate(scale)
        total, sums = self._backward(batches, count)
        loss, *sums = processes.sum((total.item(), *sums.tolist()), self.device)
        norm = None
        if not self.config.step_in_backward:
            self.weights.sum_gradients(processes)
            norm = self.weights.gradient_norm(processes)
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            self.weights.forget_gradients()
            raise LlamaFastError(
                f"step {step + 1}: the loss is {loss:g}"
                + (f" and the gradient's norm {norm:g}" if norm is not None else "")
                + f"; lower the learning rate (now {self.config.learning_rate * scale:g}), or look "
                "at the weights that the training began with"
            )
        if norm is not None:
            self.weights.step(self._clip(norm))
        return {
            "step": step + 1,
            "epoch": self.rows.epoch(step),
            "loss": loss,
            "learning_rate": self.config.learning_rate * scale,
            "grad_norm": norm,
            "tokens": tokens,
            "kept": kept,
            **dict(zip(self.objective.measures, [s / count for s in sums], strict=True)),
        }

    def _clip(self, norm: float) -> float:
        """What gradients of that norm are multiplied by."""
        most = self.config.grad_clip
        return 1.0 if most is None or norm <= most else most / norm

    def _backward(
        self, batches: list[tuple[Any, bool]], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leaves the gradients of the step's mean loss; returns it and the sums of the measures.

        batches  each with whether it is this process's own; the others' are computed and count 0
        """
        total = torch.zeros((), device=self.device)
        sums = torch.zeros(len(self.objective.measures), device=self.device)
        checkpointing = self.config.checkpointing
        with activation_checkpointing(self.model) if checkpointing else nullcontext():
            for batch, own in batches:
                loss, measured = self.objective.loss(self.model, batch.to(self.device))
                loss = loss / count if own else 0 * loss
                total += loss.detach()
                if own and measured is not None:
                    sums += measured
                if self.config.step_in_backward and not torch.isfinite(loss):
                    break  # before any weight is updated by it
                loss.backward()
                self.weights.take_gradients()
        return total, sums

    def _evaluate(self, step: int) -> Judged | None:
        if self.held_out is None:
            return None
        judged = self.objective.evaluate(
            self.model, self.held_out, self.config.micro_batch_size or 8
        )
        self.history.held_out.append(judged.record(step))
        return judged

    def _sampled(self) -> str | None:
        """The sample draws from generators of its own: the training's go on untouched. A fully
        sharded model is asked for it by all processes, any other by the first."""
        if self.sample is None or not (self.processes.main or is_fully_sharded(self.model)):
            return None
        state = random_state(self.device)
        try:
            with mode(self.model, training=False):
                return self.sample()
        finally:
            set_random_state(state)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
