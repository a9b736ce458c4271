"""The state of a training in a file: written whole or not at all, read back to the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writers import PthWriter
from ..distributed import Processes
from ..distributed.fully_sharded import gathered
from ..errors import CheckpointError
from ..utils.files import atomic_file, why
from ..utils.memory import resident_peak
from .weights import Weights

STATE_FILE = "training.pt"
FORMAT = 2


@dataclass
class History:
    """What a training recorded: plain numbers, ready for JSON.

    train     of each step {step, epoch, loss, learning_rate, grad_norm, tokens, kept}: the loss in
              nats per trained token, tokens and those trained (kept) of this step
    held_out  of each evaluation, the first one before any step, {step, loss, perplexity,
              bits_per_byte}; what is not known is None
    seconds, peak_bytes   of each step, in their order: how long it took, without its evaluation,
              and the most memory so far, of the GPU or of the process. They differ from run to run
    """

    train: list[dict[str, float | None]] = field(default_factory=list)
    held_out: list[dict[str, float | None]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(record["tokens"] for record in self.train)

    @property
    def kept(self) -> int:
        return sum(record["kept"] for record in self.train)


def peak_memory(device: torch.device) -> int:
    """Returns the bytes that torch has held at most on a GPU, or this process on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators of the CPU and of every GPU."""
    gpus = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class StateFile:
    """identity: what the training is made of; a state of another one is refused."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(folder) / STATE_FILE
        self.identity = identity
        self.saved: int | None = None  # the step of the state that is there

    def save(self, step: int, history: History, weights: Weights, device: torch.device) -> None:
        """Replaces the state in one step. Of several processes the first writes; all must call it,
        as parts of a fully sharded model are gathered. Raises CheckpointError where there is no
        room for it; the one that was there is there still."""
        if not Processes().main:
            if weights.cut:
                _stored(weights.state(), gathered)
            return
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "step": step,
            "history": dataclasses.asdict(history),
            "random": random_state(device),
            **weights.state(),
        }
        try:
            with atomic_file(self.path, CheckpointError) as beside:
                writer = PthWriter(beside)
                try:
                    writer.close(_stored(content, lambda tensor: writer.put(gathered(tensor))))
                except BaseException:
                    writer.abandon()
                    raise
        except CheckpointError as error:
            kept = (
                "no state is there yet"
                if self.saved is None
                else f"that of step {self.saved} is still there"
            )
            reason = why(error.__cause__ or error)
            raise CheckpointError(
                f"the state after step {step} could not be written to {self.path}: {reason}; "
                f"{kept}. Make room and run again: the training goes on from there"
            ) from error
        self.saved = step

    def load(self, weights: Weights) -> tuple[int, History] | None:
        """Puts the state that is there into the weights, the optimizer and the generators → the
        steps that are done, and what they recorded; None where there is no state.

        Raises CheckpointError for one that is damaged or of another training.
        """
        if not self.path.exists():
            return None
        try:
            # Mapped: of a fully sharded model each process reads its part alone.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            found, step = state["identity"], state["step"]
            history = History(**state["history"])
            if found == self.identity:
                weights.load_state(state)
                set_random_state(state["random"])
        except Exception as error:  # whatever a damaged file makes torch or a model raise
            raise CheckpointError(
                f"{self.path} is no complete state of this model's training ({error}); "
                "remove it to start anew"
            ) from error
        if found != self.identity:
            raise CheckpointError(
                f"{self.path} is the state of another training: it has "
                f"{difference(found, self.identity)}; use the same settings and data, or another "
                "folder to start anew"
            )
        self.saved = step
        return step, history


def _stored(value: Any, store: Callable[[torch.Tensor], Any]) -> Any:
    """Returns plain values with each tensor in them replaced by what `store` makes of it, one after
    another: a fully sharded model is never whole."""
    if isinstance(value, torch.Tensor):
        return store(value)
    if isinstance(value, dict):
        return {key: _stored(item, store) for key, item in value.items()}
    if isinstance(value, list):
        return [_stored(item, store) for item in value]
    return value


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Returns what of two identities differs: "learning_rate=0.5, not 0.1, and other data"."""
    words = []
    for key in wanted.keys() | found.keys():
        one, other = found.get(key), wanted.get(key)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            names = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
            words += [f"{name}={one.get(name)!r}, not {other.get(name)!r}" for name in names]
        else:
            words.append(f"other {key}")
    return " and ".join(sorted(words))
