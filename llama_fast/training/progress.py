"""Progress bars: of a training (step, loss, tokens per second, time left), and of its data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .objective import Judged


class TrainingProgress:
    """A context manager; with ``shown=False`` it shows nothing. Loss and speed are smoothed."""

    def __init__(self, steps: int, first_step: int, *, shown: bool) -> None:
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            disable=not shown,
            speed_estimate_period=120,
            console=Console(stderr=True),
        )
        self._shown = shown
        self._task = self._bar.add_task(
            "train", total=steps, completed=first_step, loss=0.0, speed=0.0
        )
        self._loss, self._count = 0.0, 0
        self._tokens, self._seconds = 0.0, 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def stepped(self, step: int, found: dict[str, Any], seconds: float) -> None:
        loss = found["loss"]
        self._count += 1
        share = max(0.05, 1 / self._count)  # a plain mean at first
        self._loss += share * (loss - self._loss)
        self._tokens += found["tokens"]
        self._seconds += seconds
        speed = self._tokens / max(self._seconds, 1e-9)
        self._bar.update(self._task, completed=step, loss=self._loss, speed=speed)

    def evaluated(self, step: int, loss: float, judged: Judged | None, sample: str | None) -> None:
        """A line that stays, also where the output is no terminal."""
        if not self._shown or (judged is None and sample is None):
            return
        text = f"step {step}: loss {loss:.3f}"
        if judged is not None:
            text += f", held-out {judged}"
        if sample is not None:
            text += f"\n  {' '.join(sample.split())}"
        self._bar.console.print(text, markup=False, highlight=False)


class ReadingProgress:
    """A bar of bytes read and encoded, on the error stream, for more than `least` bytes and where
    that is a terminal; otherwise it shows nothing."""

    def __init__(self, total: int, *, shown: bool, least: int = 2_000_000) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("reading"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and total > least and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("read", total=total)

    def __enter__(self) -> ReadingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        self._bar.advance(self._task, n_bytes)
