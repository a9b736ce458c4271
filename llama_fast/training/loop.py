"""The training loop: next-token loss, AdamW, cosine schedule with warm-up, save and resume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, LlamaFastError
from ..utils.files import atomic_file
from .data import PackedDataset
from .progress import TrainingProgress

STATE_FILE = "training.pt"


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps; a step takes batch_size rows of one block each.

    The learning rate rises evenly to learning_rate over warmup_steps, then falls along a half
    cosine to final_fraction of it. weight_decay is for matrices only, not for norms. grad_clip: the
    largest norm of all gradients together. eval_every, save_every: in steps; 0 is only at the end.
    Raises ConfigError for values that cannot be.
    """

    steps: int
    batch_size: int = 4
    learning_rate: float = 1e-3
    final_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0),
                            ("eval_every", 0), ("save_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


@dataclass
class History:
    """What a training recorded: plain numbers, ready for JSON.

    train: of each step {step, loss, learning_rate, grad_norm}; held_out: {step, loss} of each
    evaluation. Losses are in nats per token, steps count from 1. seconds: of the whole training,
    over all its resumed parts.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@torch.no_grad()
def evaluate(model: nn.Module, dataset: PackedDataset, batch_size: int = 8) -> float:
    """Mean loss in nats per token over all blocks of ``dataset``."""
    device, total = model.head.weight.device, 0.0
    with _mode(model, training=False):
        for start in range(0, len(dataset), batch_size):
            indices = range(start, min(start + batch_size, len(dataset)))
            inputs, targets = dataset.rows(indices)
            loss = model.loss(inputs.to(device), targets.to(device))
            total += float(loss) * len(indices)
    return total / len(dataset)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (the embedding included) and none on norms."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def train(
    model: nn.Module,
    dataset: PackedDataset,
    config: TrainConfig,
    *,
    held_out: PackedDataset | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Trains ``model`` in place, which should hold float32 weights, and returns what was recorded.

    folder: where the state is kept in ``training.pt``. If one is there the training is resumed
    from it, and ends with bit for bit the weights it would have had without the interruption (on
    the same machine with the same number of threads).

    Raises CheckpointError if that state is damaged or of another training, and LlamaFastError when
    the loss is no longer finite.
    """
    optimizer = make_optimizer(model, config)
    history, first_step = History(), 0
    state_file = None if folder is None else Path(folder) / STATE_FILE
    identity = {"config": dataclasses.asdict(config), "data": dataset.fingerprint()}
    if state_file is not None and state_file.exists():
        first_step, history = _resume(state_file, identity, model, optimizer)

    device = model.head.weight.device
    started = time.monotonic() - history.seconds
    with (
        _mode(model, training=True),
        TrainingProgress(config.steps, first_step, history.tokens, shown=progress) as shown,
    ):
        for step in range(first_step, config.steps):
            learning_rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            inputs, targets = dataset.batch(step, config.batch_size, config.seed)
            loss = model.loss(inputs.to(device), targets.to(device))
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
                raise LlamaFastError(
                    f"step {step + 1}: the loss is {loss.item():g} and the gradient's norm "
                    f"{grad_norm.item():g}; lower the learning rate (now {learning_rate:g})"
                )
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            history.tokens += inputs.numel()
            history.seconds = time.monotonic() - started
            history.train.append(
                {
                    "step": done,
                    "loss": loss.item(),
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm.item(),
                }
            )
            last = done == config.steps
            if held_out is not None and _due(done, config.eval_every, last):
                history.held_out.append({"step": done, "loss": evaluate(model, held_out)})
                history.seconds = time.monotonic() - started
                shown.evaluated(done, loss.item(), history.held_out[-1]["loss"])
            if state_file is not None and _due(done, config.save_every, last):
                _save(state_file, identity, done, history, model, optimizer)
            shown.stepped(done, loss.item(), history.tokens)
    return history


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _save(
    path: Path,
    identity: dict[str, Any],
    step: int,
    history: History,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    with atomic_file(path) as beside:
        torch.save(
            {
                **identity,
                "step": step,
                "history": dataclasses.asdict(history),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
            },
            beside,
        )


def _resume(
    path: Path, identity: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, History]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: state[key] for key in identity}
        step, history = state["step"], History(**state["history"])
        if found == identity:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
    except Exception as error:  # whatever a damaged file makes torch or a model raise
        raise CheckpointError(
            f"{path} is no complete state of this model's training ({error}); "
            "remove it to start anew"
        ) from error
    if found != identity:
        raise CheckpointError(
            f"{path} is the state of another training: it has {_difference(found, identity)}; "
            "use the same config and data, or another folder to start anew"
        )
    return step, history


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if found["data"] != wanted["data"]:
        return "other data"
    names = [k for k in wanted["config"] if found["config"].get(k) != wanted["config"][k]]
    return ", ".join(
        f"{name}={found['config'].get(name)!r}, not {wanted['config'][name]!r}" for name in names
    )
