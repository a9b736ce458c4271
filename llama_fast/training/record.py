"""What a training writes while it runs: a table of its steps, and TensorBoard where it is there."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from .state import History

CSV_FILE, TENSORBOARD = "log.csv", "tensorboard"
COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "kept", "seconds",
    "tokens_per_second", "kept_per_second", "held_out_loss", "held_out_perplexity",
    "held_out_bits_per_byte",
)  # fmt: skip


class Record:
    """A context manager. A folder of None: nothing is written.

    log.csv has a line a step, written as the step ends. It is begun anew from the history when a
    training is resumed, since the steps after the last saved state are taken once more.
    """

    def __init__(self, folder: Path | None, history: History) -> None:
        self._folder, self._history = folder, history
        self._file: Any = None
        self._board: Any = None

    def __enter__(self) -> Record:
        if self._folder is None:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self._folder / CSV_FILE, "w", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._file, COLUMNS)
        self._table.writeheader()
        held_out = {record["step"]: record for record in self._history.held_out}
        for record, seconds in zip(self._history.train, self._history.seconds, strict=True):
            self._row(record, seconds, held_out.get(record["step"]))
        self._file.flush()
        self._board = _tensorboard(self._folder / TENSORBOARD, len(self._history.train))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, record: dict[str, Any], seconds: float, held_out: dict[str, Any] | None) -> None:
        if self._file is None:
            return
        self._row(record, seconds, held_out)
        self._file.flush()
        if self._board is not None:
            values = {f"train/{name}": value for name, value in record.items() if name != "step"}
            values |= {f"held_out/{k}": v for k, v in (held_out or {}).items() if k != "step"}
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, record["step"])

    def _row(self, record: dict[str, Any], seconds: float, held_out: dict[str, Any] | None) -> None:
        rates = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(record["tokens"] / max(seconds, 1e-9), 1),
            "kept_per_second": round(record["kept"] / max(seconds, 1e-9), 1),
        }
        judged = {f"held_out_{k}": v for k, v in (held_out or {}).items() if k != "step"}
        self._table.writerow({**record, **rates, **judged})


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer whose curves go on after `step`; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
