"""A picture of how vocabularies fit texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import LlamaFastError
from ..utils.files import atomic_file
from .vocabulary_report import Report

COLORS = ("#8fa8c8", "#1f4e8c")


def plot(reports: Mapping[str, Report], path: str | Path) -> None:
    """Writes a PNG: the bytes a token carries, by script, a bar for each vocabulary (name to its
    report on the same texts).

    Needs matplotlib, which the package does not install. Raises LlamaFastError without it, and
    where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LlamaFastError("the picture needs matplotlib: pip install matplotlib") from error
    first = next(iter(reports.values()))
    scripts = ["all", *first.by_script]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(scripts)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / len(reports)
    for n, (name, report) in enumerate(reports.items()):
        fits = {"all": report.all, **report.by_script}
        values = [fits[script].bytes_per_token if script in fits else 0.0 for script in scripts]
        places = [at + (n - (len(reports) - 1) / 2) * height for at in range(len(scripts))]
        label = f"{name}: {report.vocab_size:,} tokens"
        bars = axes.barh(places, values, height, color=COLORS[n % len(COLORS)], label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(range(len(scripts)), scripts)
    axes.invert_yaxis()
    axes.set_xlabel("bytes per token (more is fewer tokens)")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    with atomic_file(path) as beside:
        figure.savefig(beside, format="png")
