"""What a training writes while it runs: a table of its steps, and TensorBoard where it is there."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..utils.files import atomic_file, make_folder, why
from .state import History

CSV_FILE, TENSORBOARD = "log.csv", "tensorboard"
COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "kept", "seconds",
    "tokens_per_second", "kept_per_second", "peak_bytes",
)  # fmt: skip


class Record:
    """A context manager. A folder of None: nothing is written. measures, judged: names of what the
    objective records of a step and of an evaluation.

    log.csv has a line a step, written as the step ends. It is begun anew from the history when a
    training is resumed, since the steps after the last saved state are taken once more. Raises
    CheckpointError where it cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        history: History,
        measures: Sequence[str] = (),
        judged: Sequence[str] = (),
    ) -> None:
        self._folder, self._history = folder, history
        self._columns = (*COLUMNS, *measures, *(f"held_out_{name}" for name in judged))
        self._file: Any = None
        self._board: Any = None

    def __enter__(self) -> Record:
        if self._folder is None:
            return self
        path = make_folder(self._folder, CheckpointError) / CSV_FILE
        held_out = {record["step"]: record for record in self._history.held_out}
        with atomic_file(path, CheckpointError) as beside:
            with open(beside, "w", newline="", encoding="utf-8") as self._file:
                self._table = csv.DictWriter(self._file, self._columns)
                self._table.writeheader()
                for index, record in enumerate(self._history.train):
                    self._row(index, held_out.get(record["step"]))
        self._file = open(path, "a", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._file, self._columns)
        self._board = _tensorboard(self._folder / TENSORBOARD, len(self._history.train))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses the last line again
                self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, judged: bool) -> None:
        """Writes down the step that the history ends with.

        judged  whether there is an evaluation of it
        """
        if self._file is None:
            return
        held_out = self._history.held_out[-1] if judged else None
        try:
            self._row(-1, held_out)
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name} cannot be written: {why(error)}; make room and run again: the "
                "training goes on from the last saved state"
            ) from error
        if self._board is not None:
            values = {f"train/{name}": x for name, x in self._history.train[-1].items()}
            values |= {f"held_out/{name}": x for name, x in (held_out or {}).items()}
            for name, value in values.items():
                if value is not None and not name.endswith("/step"):
                    self._board.add_scalar(name, value, step)

    def _row(self, index: int, held_out: dict[str, Any] | None) -> None:
        record, seconds = self._history.train[index], self._history.seconds[index]
        measured = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(record["tokens"] / max(seconds, 1e-9), 1),
            "kept_per_second": round(record["kept"] / max(seconds, 1e-9), 1),
            "peak_bytes": self._history.peak_bytes[index],
        }
        judged = {f"held_out_{k}": v for k, v in (held_out or {}).items() if k != "step"}
        self._table.writerow({**record, **measured, **judged})


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer whose curves go on after `step`; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
