"""`llama-fast report`: results files as a page and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, example, file_to_write, folder_to_fill
from .terminal import show


@example("llama-fast report results.json --out report")
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Files of llama-fast bench --json, make bench-cpu, or pytest benchmarks/ "
            "--benchmark-json.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where report.md and the figures go.", callback=folder_to_fill
        ),
    ] = Path("report"),
    figures: Annotated[
        bool,
        typer.Option(
            "--figures/--no-figures", help="Figures need matplotlib: pip install matplotlib."
        ),
    ] = True,
    write: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PAGE",
            help="Also put figures into this page, where comments ask for them: "
            "<!-- decode bf16: × transformers --><!-- end -->. May be given several times.",
            callback=file_to_write,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a page and pictures of what was measured: roofline, speed-ups, lengths, memory.

    What was measured is in a file that for example `llama-fast bench rms_norm --json results.json`
    writes.

    A row that is too noisy to count is marked with ~ and drawn hollow or pale.
    """
    from ..bench.report import fill
    from ..bench.report import write as write_report
    from ..bench.results import load

    found = [load(path) for path in results]
    made = write_report(found, out, figures=figures)
    for page in write or ():
        fill(page, found)
    show(f"{made.page}: {len(made.figures)} figures", *(f"  {path}" for path in made.figures))
