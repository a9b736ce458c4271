"""`llama-fast quantize`: a folder of integers, which loads at once and decodes faster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .convert import report_written
from .options import Debug, DType, Threads, example, set_threads
from .terminal import weights_bar


@example("llama-fast quantize Llama-3.2-1B Llama-3.2-1B-int4 --bits 4")
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model to read.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; a new one.")],
    bits: Annotated[int, typer.Option(metavar="4|8", help="Bits of a weight.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128",
            help="Columns that share a scale: fewer are closer to the weights, and larger.",
            show_default="32 for 4 bits, 64 for 8",
        ),
    ] = None,
    offsets: Annotated[
        bool,
        typer.Option("--offsets", help="Store an offset beside each scale: closer, and larger."),
    ] = False,
    head_bits: Annotated[
        int,
        typer.Option(
            metavar="4|8|16", help="Bits of the embedding and the head; 16 keeps them as they are."
        ),
    ] = 8,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Compute in this dtype.", show_default="that of the weights in SRC"),
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Store a model's weights as 4-bit or 8-bit integers.

    The new folder is mapped into memory when it is loaded, so that it loads at once. One weight at
    a time is in memory. The tokenizer's files are copied. The folder appears whole, or not at all.
    """
    set_threads(threads)
    from ..quantize import NAMED, Quantization, WeightFormat
    from ..quantize_folder import quantize_folder

    default = {4: NAMED["int4"].mlp, 8: NAMED["int8"].mlp}
    if bits not in default:
        raise typer.BadParameter(f"{bits}; it must be 4 or 8", param_hint="--bits")
    if head_bits not in (*default, 16):
        raise typer.BadParameter(f"{head_bits}; it must be 4, 8 or 16", param_hint="--head-bits")
    size = default[bits].group_size if group_size is None else group_size
    form = WeightFormat(bits, size, not offsets)
    of_head = None
    if head_bits == bits:
        of_head = form
    elif head_bits != 16:
        of_head = WeightFormat(head_bits, default[head_bits].group_size, not offsets)
    settings = Quantization(form, form, of_head, of_head)

    start = time.perf_counter()
    with weights_bar(f"Writing {target.name}") as progress:
        quantize_folder(source, target, settings, dtype=dtype and dtype.torch, progress=progress)
    report_written(target, start)
