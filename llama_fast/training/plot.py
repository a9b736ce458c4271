"""The loss curve of a training as a picture."""

from __future__ import annotations

from pathlib import Path

from ..errors import LlamaFastError
from ..utils.files import atomic_file
from .state import History


def plot_loss(
    history: History,
    path: str | Path,
    *,
    title: str = "Training loss",
    unit: str = "nats per token",
) -> None:
    """Writes a PNG with the loss of each step, its running mean, and the held-out loss, over steps
    and tokens.

    Needs matplotlib, which the package does not install. Raises LlamaFastError without it, and
    where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LlamaFastError("the loss curve needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in history.train]
    losses = [record["loss"] for record in history.train]
    axes.plot(steps, losses, color="#b8c9de", linewidth=0.6, label="training, each step")
    axes.plot(
        steps, _running_mean(losses), color="#1f4e8c", linewidth=1.6, label="training, running mean"
    )
    if history.held_out:
        axes.plot(
            [record["step"] for record in history.held_out],
            [record["loss"] for record in history.held_out],
            "o-", color="#c8553d", markersize=4, linewidth=1.2, label="held-out texts",
        )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("step")
    per_step = history.tokens / steps[-1]
    above = axes.secondary_xaxis(
        "top", functions=(lambda step: step * per_step, lambda tokens: tokens / per_step)
    )
    above.set_xlabel("tokens")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_ylim(0, max(losses) * 1.05)
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic_file(path) as beside:
        figure.savefig(beside, format="png")


def _running_mean(values: list[float]) -> list[float]:
    """Over about a tenth of a short training, and 33 steps of a long one."""
    keep = min(0.97, max(0.0, 1 - 10 / len(values)))
    means: list[float] = []
    for value in values:
        means.append(value if not means else keep * means[-1] + (1 - keep) * value)
    return means
