"""Log-probabilities of whole answers; those of the first model, made once and kept in a file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..distributed import Processes
from ..distributed.fully_sharded import gathered
from ..errors import CheckpointError
from ..model import Llama
from ..utils.files import atomic_file, make_folder
from .evaluation import mode

REFERENCE_FILES = "reference-*.safetensors"  # in the folder of a training


def log_probabilities(model: Llama, batch: Any) -> Tensor:
    """Returns, of each pair of a batch of preferences, log p(chosen) and log p(rejected): (P,2)
    float32, sums over the trained tokens of each. The logits are never whole."""
    lengths = batch.cu_seqlens.diff().tolist()
    losses = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="none")
    # Each piece is summed apart: its sum depends neither on what is packed before it, as that by a
    # running sum would, nor on the order of atomic additions.
    sums = torch.stack([piece.sum() for piece in losses[0].split(lengths)])
    return -sums.view(-1, 2)


class WithReference:
    """Data of preferences whose batches carry the log-probabilities under the first model.

    values: of each row of the data, (P,2) float32. key: names the model and the data they are of.
    """

    def __init__(self, data: Any, values: list[Tensor], key: str) -> None:
        self.data, self.values, self.key = data, values, key

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Iterable[int]) -> Any:
        rows = list(indices)
        reference = torch.cat([self.values[row] for row in rows])
        return self.data.batch(rows)._replace(reference=reference)

    def order(self, seed: int, epoch: int) -> list[int]:
        return self.data.order(seed, epoch)

    def fingerprint(self) -> str:
        return f"{self.data.fingerprint()} {self.key}"


def with_reference(
    model: Llama, data: Any, folder: Path | None = None, *, progress: bool = True
) -> WithReference:
    """Returns the data with the log-probabilities of its answers under the model as it is now.

    folder  where they are kept, by what they follow from: the data and every weight. They are made
            anew where no whole file of that name is there
    Raises CheckpointError where the file cannot be written.
    """
    key = hashlib.blake2b(f"{data.fingerprint()} {checksum(model)}".encode()).hexdigest()[:32]
    path = None if folder is None else folder / REFERENCE_FILES.replace("*", key)
    values = None if path is None else _load(path, len(data))
    if values is None:
        values = _made(model, data, progress)
        if path is not None and Processes().main:
            _save(path, values)
    return WithReference(data, values, key)


def checksum(model: nn.Module) -> str:
    """Returns a text that differs where any weight of the model does. Of a fully sharded one all
    processes call it, and have the same."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        content = gathered(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        found.update(f"{name} {tensor.dtype} {zlib.crc32(content.numpy())}".encode())
    return found.hexdigest()


@torch.no_grad()
def _made(model: Llama, data: Any, progress: bool) -> list[Tensor]:
    """Each of several processes makes its part."""
    processes = Processes()
    rows = track(
        list(processes.turns(range(len(data)))),
        "reference",
        console=Console(stderr=True),
        transient=True,
        disable=not (progress and processes.main),
    )
    with mode(model, training=False):
        found = [
            (log_probabilities(model, data.batch([row]).to(model.device)).float().cpu(), own)
            for row, own in rows
        ]
    values: list[Any] = [None] * len(data)
    for rank, part in enumerate(processes.gather([value for value, own in found if own])):
        values[rank :: processes.size] = part
    return values


def _save(path: Path, values: list[Tensor]) -> None:
    pairs = torch.tensor([len(value) for value in values], device="cpu")
    make_folder(path.parent, CheckpointError)
    with atomic_file(path, CheckpointError, fails_with=(SafetensorError,)) as beside:
        save_file({"values": torch.cat(values), "pairs": pairs}, beside)


def _load(path: Path, rows: int) -> list[Tensor] | None:
    """What was kept, one tensor a row; None where it is not there, or not whole."""
    try:
        found = load_file(path)
        values = list(found["values"].split(found["pairs"].tolist()))
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return None
    return values if len(values) == rows else None
