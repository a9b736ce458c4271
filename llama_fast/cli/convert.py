"""`llama-fast convert`: a checkpoint from one format to the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Debug, DType, Format, Named, Target, example
from .terminal import note, size, weights_bar

if TYPE_CHECKING:
    from torch import Tensor


@example("llama-fast convert Llama-3.2-1B Llama-3.2-1B-hf --to hf")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model to read.")],
    target: Target,
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
    merge: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Make the LoRA of this folder part of the weights.",
            show_default="none",
        ),
    ] = None,
    over: Annotated[
        Named | None,
        typer.Option(
            help="With --merge: the LoRA was trained over integers (finetune --quantize), and fits "
            "what these stand for; the weights are rounded to them first.",
            show_default="the weights as stored",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Convert a model between Meta's and Hugging Face's formats, or merge a LoRA into it.

    One tensor at a time is in memory, and the weights keep every bit unless --dtype or --merge is
    given. The tokenizer's files are copied. The new folder appears whole, or not at all.
    """
    if over is not None and merge is None:
        raise typer.BadParameter(
            f"it says what a LoRA was trained over. Write: --merge DIR --over {over.value}",
            param_hint="--over",
        )
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
            merge=merge,
            rounding=over and _rounding(over.value),
            progress=progress,
        )
    report_written(target, start)


def _rounding(name: str) -> Callable[[str, Tensor], Tensor]:
    """Returns what gives the floats that the integers of a weight stand for."""
    from ..config.quantization import Quantization
    from ..ops.quantized_weight import round_weight

    settings = Quantization.of(name)

    def rounded(weight_name: str, weight: Tensor) -> Tensor:
        form = settings.of_weight(weight_name)
        return weight if form is None else round_weight(weight, form).dequantize()

    return rounded


def report_written(folder: Path, start: float) -> None:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    seconds = time.perf_counter() - start
    note(f"wrote {folder}: {len(sizes)} files, {size(sum(sizes))} in {seconds:.1f} s")
