"""`llama-fast convert`: a checkpoint from one format to the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, DType, Format, example
from .terminal import note, size, weights_bar


@example("llama-fast convert Llama-3.2-1B Llama-3.2-1B-hf --to hf")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model to read.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; a new one.")],
    to: Annotated[Format, typer.Option("--to", help="Format to write.")],
    dtype: Annotated[
        DType | None, typer.Option(help="Convert the weights.", show_default="as stored")
    ] = None,
    files: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Cut the weights over N files (only with --to meta)."
        ),
    ] = 1,
    debug: Debug = False,
) -> None:
    """Convert a model between Meta's and Hugging Face's formats.

    One tensor at a time is in memory, and the weights keep every bit unless --dtype is given. The
    tokenizer's files are copied. The new folder appears whole, or not at all.
    """
    if files > 1 and to is not Format.meta:
        raise typer.BadParameter(
            f"only Meta's format is cut into shards. Write: --to meta --files {files}",
            param_hint="--files",
        )
    from ..checkpoint import convert as convert_checkpoint

    start = time.perf_counter()
    with weights_bar(f"Writing {target.name}", lines=True) as progress:
        convert_checkpoint(
            source,
            target,
            to.value,
            dtype=dtype and dtype.torch,
            n_files=files,
            progress=progress,
        )
    report_written(target, start)


def report_written(folder: Path, start: float) -> None:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    seconds = time.perf_counter() - start
    note(f"wrote {folder}: {len(sizes)} files, {size(sum(sizes))} in {seconds:.1f} s")
