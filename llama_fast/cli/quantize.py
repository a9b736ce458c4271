"""`llama-fast quantize`: a folder of integers, which loads at once and decodes faster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from .convert import report_written
from .options import DEMO, Debug, DType, Target, Threads, example, set_threads
from .terminal import BYTE_ORDER_MARK, show, table, weights_bar
from .units import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint

REPORT = "quantization_report.json"
ROW, CALIBRATION_TOKENS, REPORT_TOKENS = 512, 16384, 4096


@example("llama-fast quantize Llama-3.2-1B Llama-3.2-1B-int4 --bits 4")
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model to read.")],
    target: Target,
    bits: Annotated[int, typer.Option(metavar="4|8", help="Bits of a weight.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128",
            help="Columns that share a scale: fewer are closer to the weights, and larger.",
            show_default="32 for 4 bits, 64 for 8",
        ),
    ] = None,
    minima: Annotated[
        bool,
        typer.Option(
            "--minima",
            "--offsets",
            help="Store the minimum of a group beside its scale: larger; closer with 8 bits, not "
            "with 4.",
        ),
    ] = False,
    head_bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|8|16",
            help="Bits of the embedding and the head, whose rounding changes most; 16 keeps them "
            "as they are.",
            show_default="as --bits",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A text: the layers are rounded so that what they make of it changes least. Takes "
            "minutes for a billion weights.",
            show_default="to the nearest",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Compare with the model in SRC on a text: errors of each layer, perplexity and "
            f"divergence, with --kv-cache int8 too. Also written to {REPORT} in DST.",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The text for --report.",
            show_default="stories of the model that ships",
        ),
    ] = None,
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
    if text is not None and not report:
        raise typer.BadParameter(
            f"it is the text that --report reads. Write: --report --text {text}",
            param_hint="--text",
        )
    from ..config.quantization import NAMED, Quantization, WeightFormat
    from ..quantization.folder import open_float_checkpoint, quantize_folder

    default = {4: NAMED["int4"].mlp, 8: NAMED["int8"].mlp}
    if bits not in default:
        raise typer.BadParameter(f"{bits} is not 4 or 8. Write: --bits 4", param_hint="--bits")
    head_bits = bits if head_bits is None else head_bits
    if head_bits not in (*default, 16):
        raise typer.BadParameter(
            f"{head_bits} is not 4, 8 or 16. Write: --head-bits 8", param_hint="--head-bits"
        )
    size = default[bits].group_size if group_size is None else group_size
    form = WeightFormat(bits, size, not minima)
    of_head = None
    if head_bits == bits:
        of_head = form
    elif head_bits != 16:
        of_head = WeightFormat(head_bits, default[head_bits].group_size, not minima)
    settings = Quantization(form, form, of_head, of_head)

    checkpoint = open_float_checkpoint(source)
    calibration = judged = None
    if calibrate is not None:
        calibration = _tokens(checkpoint, [_read(calibrate)], CALIBRATION_TOKENS)
    if report:
        judged = _tokens(checkpoint, [_read(text)] if text else _stories(), REPORT_TOKENS)
    start = time.perf_counter()
    with weights_bar(f"Writing {target.name}", lines=True) as progress:
        quantize_folder(
            source,
            target,
            settings,
            calibration=calibration,
            dtype=dtype and dtype.torch,
            progress=progress,
        )
    report_written(target, start)
    if judged is not None:
        _report(checkpoint, target, judged)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None


def _stories() -> list[str]:
    """Returns texts of the demo model's world, of a kind that it was not trained on."""
    return json.loads((DEMO / "stories.json").read_text(encoding="utf-8"))


def _tokens(checkpoint: Checkpoint, documents: Iterable[str], most: int) -> Tensor:
    """Returns the documents one after another in rows: (B,T) int64, at most `most` tokens."""
    import torch

    from ..tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(checkpoint.folder)
    has_bos, has_eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document, bos=has_bos, eos=has_eos)
        if len(ids) >= most:
            break
    if len(ids) < 4:
        raise PromptError(f"the text has {len(ids) - 2} tokens; give one of some hundreds or more")
    T = min(len(ids), ROW, checkpoint.config.max_seq_len)
    return torch.tensor(ids[: min(len(ids), most) // T * T], device="cpu").view(-1, T)


def _report(checkpoint: Checkpoint, target: Path, tokens: Tensor) -> None:
    from ..config.quantization import WeightFormat
    from ..model import Llama
    from ..quantization.report import compare

    quantized = Llama.from_pretrained(target, device="cpu", max_seq_len=tokens.shape[1])
    with weights_bar("Comparing with the float model", lines=True) as progress:
        found = compare(checkpoint, quantized, tokens, progress=progress)
    write_json(target / REPORT, found.to_dict())

    rows = table("", "perplexity", "divergence", "largest", "top-1", numbers=True)
    rows.add_row("float model", f"{found.perplexity:.4f}", "", "", "")
    for name, predictions in (
        ("quantised weights", found.quantized),
        ("int8 KV cache", found.kv_cache),
        ("both", found.both),
    ):
        rows.add_row(
            name,
            f"{predictions.perplexity:.4f}",
            f"{predictions.divergence:.2e}",
            f"{predictions.divergence_largest:.2e}",
            f"{predictions.top1_agreement:.2%}",
        )
    show(
        f"{found.tokens:,} tokens; divergence from the float model in nats a token; top-1: the "
        "share with the same likeliest token",
        rows,
    )

    rows = table("weight", "form", "weights", "outputs", "after the layer", numbers=True)
    for at, error in enumerate(found.weights):
        form = WeightFormat(error.bits, error.group_size, error.symmetric)
        layer, following = (
            e.name.split(".")[1] if e and e.name.startswith("layers.") else None
            for e in (error, found.weights[at + 1] if at + 1 < len(found.weights) else None)
        )
        after = f"{found.layers[int(layer)]:.3%}" if layer and layer != following else ""
        rows.add_row(error.name, str(form), f"{error.weights:.3%}", f"{error.outputs:.3%}", after)
    show("Errors, root mean square over the size of what was there", rows)
