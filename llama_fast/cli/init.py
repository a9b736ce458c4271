"""`llama-fast init`: random weights in the shape of a published model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .convert import report_written
from .options import Debug, DType, Format, Target, example
from .sizes import LAPTOP, sized
from .terminal import note, weights_bar


@example("llama-fast init --preset 1b /tmp/random-1b")
def init(
    target: Target,
    preset: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help=f"The model: {LAPTOP}, 1b, 3b, 8b, 8b-3.1, 70b, 70b-3.1, 405b.",
        ),
    ],
    format: Annotated[Format, typer.Option(help="Format to write.")] = Format.hf,
    dtype: Annotated[DType, typer.Option(help="Of the weights.")] = DType.bfloat16,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="The same seed gives the same weights.")
    ] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A tokenizer.model or tokenizer.json to copy.",
            show_default="a made-up one",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model of random weights, to train, or to measure speed and memory without a download.

    One tensor at a time is in memory. The new folder appears whole, or not at all.
    """
    from ..checkpoint import write_random

    config = sized(preset)
    start = time.perf_counter()
    with weights_bar(f"Writing {target.name}", lines=True) as progress:
        write_random(
            target,
            config,
            format=format.value,
            dtype=dtype.torch,
            seed=seed,
            tokenizer_file=tokenizer,
            progress=progress,
        )
    report_written(target, start)
    if tokenizer is None:
        note("its tokenizer is made up: text goes in and comes out, but the tokens mean nothing")
