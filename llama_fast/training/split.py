"""Some rows of data apart from the others: what is held out, and what is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import DataError
from .packing import shuffled


class Rows:
    """Some rows of a `Data` (or `PackedDataset`), numbered anew from 0."""

    def __init__(self, data: Any, rows: Sequence[int]) -> None:
        self.data, self.rows = data, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Iterable[int]) -> Any:
        return self.data.batch([self.rows[index] for index in indices])

    def order(self, seed: int, epoch: int) -> list[int]:
        """The rows of an epoch, shuffled; it depends on the arguments alone."""
        return shuffled(len(self), seed, epoch)

    def fingerprint(self) -> str:
        rows = ",".join(map(str, self.rows))
        return hashlib.blake2b(f"{self.data.fingerprint()} {rows}".encode()).hexdigest()[:32]


def hold_out(data: Any, share: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Returns the rows to train on and those held out: a share of the packed rows, at least one,
    drawn by seed. Rows of dialogs hold whole documents; a long text may lie in both.

    Raises DataError for a share that is no part, and for too few rows.
    """
    if not 0 < share < 1:
        raise DataError(f"the held-out share is {share:g}; it must be above 0 and below 1")
    count = max(1, round(share * len(data)))
    if count >= len(data):
        raise DataError(
            f"{len(data)} packed row{'s' if len(data) != 1 else ''} cannot be parted into those to "
            "train on and those held out; give a file of held-out texts, or smaller blocks"
        )
    generator = torch.Generator().manual_seed(seed)
    held_out = set(torch.randperm(len(data), generator=generator, device="cpu")[:count].tolist())
    rest = [row for row in range(len(data)) if row not in held_out]
    return Rows(data, rest), Rows(data, sorted(held_out))
