"""What a training minimises: the loss of a batch, what it is divided by, and how a model is judged.

    step's loss = Σ over its micro-batches of `loss(batch)` / Σ of `count(batch)`

The loop (`loop.finetune`) knows no more of it, so accumulation, resuming and logs are the same for
all. Next tokens are here, preferences in `dpo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from ..model import Llama


class Judged(Protocol):
    """What an evaluation found; as a text it is what people are shown."""

    @property
    def loss(self) -> float: ...

    def record(self, step: int) -> dict[str, float | None]: ...


class Objective(Protocol):
    """measures: names of what a step records besides its loss, means over what `count` counts.
    judged: names of what an evaluation records, the loss first. unit: what the loss is in."""

    measures: tuple[str, ...]
    judged: tuple[str, ...]
    unit: str

    def identity(self) -> dict[str, Any] | None:
        """Returns the settings that decide the result; None for those of next tokens."""

    def count(self, batch: Any) -> int:
        """Returns how many terms the sum of the losses has."""

    def loss(self, model: Llama, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the sum of the losses of a batch on the model's device, and the sums of the
        measures (n,), without a gradient; None where there are none."""

    def evaluate(self, model: Llama, data: Any, batch_size: int) -> Judged:
        """Returns how the model does on held-out data, `batch_size` rows at a time; each of several
        processes takes its part, and all return the same."""


class NextToken:
    """Cross entropy of the next token, each trained token with the same weight."""

    measures: tuple[str, ...] = ()
    judged: tuple[str, ...] = ("loss", "perplexity", "bits_per_byte")
    unit = "nats per token"

    def identity(self) -> None:
        return None

    def count(self, batch: Any) -> int:
        return batch.kept

    def loss(self, model: Llama, batch: Any) -> tuple[Tensor, None]:
        loss = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum")
        return loss, None

    def evaluate(self, model: Llama, data: Any, batch_size: int) -> Evaluation:
        return evaluate(model, data, batch_size)
