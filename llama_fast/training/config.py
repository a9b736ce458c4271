"""How a training goes: steps, sizes, learning rates, precision. And which rows each step takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError
from .moments import MOMENTS

SCHEDULES = ("cosine", "linear", "constant")
HALF_WEIGHTS = ("masters", "stochastic")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `finetune`. A step takes `batch_size` rows of the data, forward and backward
    `micro_batch_size` of them at a time (None: all); its loss is the sum over all their targets
    divided by how many these are, so the second number changes memory and rounding alone.

    epochs, steps      how long: passes over the data, or so many steps where `steps` is given
    learning_rate      rises evenly over warmup_steps (None: 3% of all), then falls along the
                       schedule, "cosine", "linear" or "constant", to final_fraction of it
    embedding_learning_rate   of the embedding, the head and trained rows; None: the same
    weight_decay       of matrices, not of norms and other vectors
    grad_clip          the largest norm of all gradients together; None: any
    moments            what AdamW keeps its moments in, "float32" or "int8" (blocks of 8 bits)
    half_weights       how weights of bfloat16 take updates smaller than their rounding: with a
                       float32 copy each ("masters"), or by rounding at random ("stochastic")
    step_in_backward   each weight is updated, and its gradient freed, as soon as it is made. It
                       excludes grad_clip and several micro-batches
    checkpointing      activations of a block are computed anew in the backward pass, all but
                       attention's output; the results are the same bits
    eval_every, save_every   in steps; 0: only at the end

    Raises ConfigError for values that cannot be.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 4
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    final_fraction: float = 0.1
    warmup_steps: int | None = None
    embedding_learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float | None = 1.0
    moments: str = "float32"
    half_weights: str = "masters"
    step_in_backward: bool = False
    checkpointing: bool = False
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("micro_batch_size", 1),
                            ("warmup_steps", 0), ("seed", 0), ("eval_every", 0),
                            ("save_every", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        for name in ("epochs", "learning_rate", "embedding_learning_rate", "grad_clip", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        for name in ("final_fraction", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        for name, known in (("schedule", SCHEDULES), ("moments", MOMENTS),
                            ("half_weights", HALF_WEIGHTS)):  # fmt: skip
            if getattr(self, name) not in known:
                words = ", ".join(repr(word) for word in known)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {words}")
        if self.step_in_backward:
            several = self.micro_batch_size is not None and self.micro_batch_size < self.batch_size
            if self.grad_clip is not None or several:
                raise ConfigError(
                    "step_in_backward frees each gradient at once, so there are none to clip and "
                    "none to accumulate: give grad_clip=None and leave micro_batch_size out"
                )

    def steps_of(self, rows: int) -> int:
        """Returns the number of steps for a data set of so many rows."""
        return self.steps or max(1, math.ceil(self.rows_of(rows) / self.batch_size))

    def rows_of(self, rows: int) -> int:
        """Returns how many rows are taken in all, repeated ones counted each time."""
        return self.steps * self.batch_size if self.steps else max(1, round(self.epochs * rows))

    def scale_at(self, step: int, steps: int) -> float:
        """Returns what multiplies the learning rates in step `step` of `steps`, counted from 0."""
        warmup = math.ceil(0.03 * steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.final_fraction + (1 - self.final_fraction) * left[self.schedule]


class Ordered(Protocol):
    """Data of a number of rows, which come in an order that (seed, epoch) alone decide."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> list[int]: ...


class RowsOfSteps:
    """The rows that each step takes: epochs follow each other, each of all rows in an order of its
    own. A step at an epoch's end takes the first rows of the next, and the last step what is left.
    """

    def __init__(self, data: Ordered, config: TrainConfig) -> None:
        self._data, self._config = data, config
        self._orders: dict[int, list[int]] = {}

    def of(self, step: int, rank: int = 0, processes: int = 1) -> list[list[int]]:
        """Returns the rows of a step, counted from 0, by micro-batches: of several processes those
        of one, every so many-th of the step's, so all of them together take the same rows. A
        process has none in a step of fewer rows than processes."""
        rows = self._rows(step)[rank::processes]
        at_once = self._config.micro_batch_size or self._config.batch_size
        return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]

    def turns(self, step: int, rank: int, processes: int) -> Iterator[tuple[list[int], bool]]:
        """Yields what `of` returns, each micro-batch with True, and where another process has more
        of them, as many more of one row that is not this process's with False: in a fully sharded
        model all take part in every pass."""
        own = self.of(step, rank, processes)
        yield from ((rows, True) for rows in own)
        for _ in range(len(self.of(step, 0, processes)) - len(own)):
            yield self._rows(step)[:1], False

    def _rows(self, step: int) -> list[int]:
        size, most = self._config.batch_size, self._config.rows_of(len(self._data))
        return [self._row(i) for i in range(step * size, min((step + 1) * size, most))]

    def _row(self, place: int) -> int:
        epoch, at = divmod(place, len(self._data))
        if epoch not in self._orders:
            self._orders = {epoch: list(map(int, self._data.order(self._config.seed, epoch)))}
        return self._orders[epoch][at]

    def epoch(self, step: int) -> float:
        """Returns how many passes over the data are done after a step, counted from 0."""
        size, most = self._config.batch_size, self._config.rows_of(len(self._data))
        return min((step + 1) * size, most) / len(self._data)

    def __iter__(self) -> Iterator[list[list[int]]]:
        return map(self.of, range(self._config.steps_of(len(self._data))))
