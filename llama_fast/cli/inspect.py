"""`llama-fast inspect`: what happens inside of a model with a prompt, in words and as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, LlamaFastError, PromptError
from .loading import load_model
from .options import (
    Debug,
    Device,
    DType,
    Model,
    Named,
    OnBackend,
    Threads,
    check_backend,
    device_named,
    example,
    file_to_write,
    model_folder,
    set_threads,
    using,
)
from .terminal import columns, show, size, table, text_or_stdin

if TYPE_CHECKING:
    from rich.table import Table

    from ..checkpoint import Checkpoint, QuantizedCheckpoint
    from ..inspect import Comparison, Trace
    from ..inspect.trace import Prediction
    from ..model import Llama

EAGER = "eager"
WIDE = 130  # characters that the whole table of steps takes
LISTED = 40  # tokens in the terminal; of more, the first and the last


@example('llama-fast inspect "Once upon a time" --html page.html')
def inspect(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text.", show_default="standard input, if it is a pipe"),
    ] = None,
    model: Model = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N|all",
            help="Layers whose steps are shown, from 0.",
            show_default="the first and the last",
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option(metavar="N,N|all", help="Query heads whose scores are shown.")
    ] = "all",
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with pictures, which opens without a network.",
            callback=file_to_write,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="int4|int8|eager|DIR",
            help="Where another run of the prompt departs: with integer weights, with every op as "
            "it is defined, or another model of this shape.",
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the weights.", show_default="as stored")
    ] = None,
    device: Device = "auto",
    backend: OnBackend = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """See what happens inside of a model: each step of a prompt, and what it predicts.

    Shows the tokens, the steps of some layers with their shapes, what computed each and how long it
    took, the likeliest next tokens, and what each layer would predict if it were the last one.
    """
    text = text_or_stdin(prompt, "llama-fast inspect")
    if not text:
        raise PromptError("the prompt is empty; give some text to look into")
    folder = model_folder(model)
    chosen, chosen_heads = _numbers("--layers", layers), _numbers("--heads", heads)
    other_folder = compare not in (None, EAGER, *(named.value for named in Named))
    if other_folder:
        _check_folder(compare)

    from ..checkpoint import open_checkpoint
    from ..dispatch import use_backend
    from ..inspect import trace
    from ..tokenizer import Tokenizer

    set_threads(threads)
    where = device_named(device)
    if backend:
        check_backend(backend.value, where.type)

    checkpoint = open_checkpoint(folder)
    _check_numbers("--layers", chosen, checkpoint.config.n_layers)
    _check_numbers("--heads", chosen_heads, checkpoint.config.n_heads)
    other_checkpoint = open_checkpoint(Path(compare)) if other_folder else None

    def loaded(source: Checkpoint | QuantizedCheckpoint, quantize: str | None = None) -> Llama:
        return load_model(source, device=where, dtype=dtype and dtype.torch, quantize=quantize)

    tokenizer = Tokenizer.from_pretrained(folder)
    llama = loaded(checkpoint)
    if layers is None:
        chosen = [0, llama.config.n_layers - 1]

    def traced(llama: Llama) -> Trace:
        return trace(llama, text, tokenizer, layers=chosen, heads=chosen_heads)

    with using(backend):
        trace(llama, text, tokenizer, layers=[])  # so that no time is that of a first call
        found = traced(llama)
        comparison = None
        if compare is not None:
            if compare == EAGER:
                with use_backend(EAGER):
                    other = traced(llama)
            elif other_checkpoint is None:
                other = traced(loaded(checkpoint, compare))
            else:
                other = traced(loaded(other_checkpoint))
            comparison = found.compare(other)
    show(_tokens(found), _steps(found))
    for layer in found.layers:
        error = f"{found.attention_error(layer):.2g}"
        show(f"layers.{layer}: the kernel's heads are those of the recomputed scores to {error}")
    show("\nNext token", _likely(found.next_tokens(10)))
    show("\nWhat the residual stream predicts, by layer", _lens(found))
    if comparison is not None:
        show(f"\nBeside {compare}: {comparison.summary}", _differences(comparison))
    if html is not None:
        from ..inspect.page import write

        write(html, found, comparison, compare or "")
        show(f"{html}: {size(html.stat().st_size)}, opens in any browser")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Returns the numbers of a list, or None for all."""
    if text in (None, "all"):
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of numbers; write for example {option} 0,3 or {option} all",
            param_hint=option,
        ) from None


def _check_numbers(option: str, numbers: list[int] | None, count: int) -> None:
    """Negative ones are counted from the end."""
    wrong = [str(number) for number in numbers or () if not -count <= number < count]
    if wrong:
        raise LlamaFastError(
            f"{option} {','.join(wrong)}: the model has {option.removeprefix('--')} 0 to "
            f"{count - 1}; give some of these, or all"
        )


def _check_folder(compare: str) -> None:
    if not Path(compare).is_dir():
        raise CheckpointError(
            f"--compare {compare}: there is no such folder; write int4, int8, eager, or the folder "
            "of another model"
        )


def _spelled(piece: str | None) -> str:
    """Returns a piece in quotes; bytes, which it has as \\xe5, are not escaped once more."""
    return re.sub(r"\\\\(x[0-9a-f]{2})", r"\\\1", repr(piece))


def _tokens(trace: Trace) -> Table:
    rows = table("position", "id", "token")
    pairs = list(enumerate(zip(trace.tokens[0].tolist(), trace.pieces, strict=True)))
    left_out = len(pairs) - LISTED
    for position, (id_, piece) in pairs:
        if left_out <= 0 or not LISTED // 2 <= position < LISTED // 2 + left_out:
            rows.add_row(str(position), str(id_), _spelled(piece))
        elif position == LISTED // 2:
            rows.add_row("…", "", f"{left_out} more")
    return rows


def _steps(trace: Trace) -> Table:
    """On a narrow terminal names stand below their layer, and what can be done without is left
    out."""
    narrow = columns() < WIDE
    more = () if narrow else ("dtype", "backend", "rms")
    rows = table("step", "shape", "", "op", "µs", "moved", *more)
    last = ""
    for name, letters, shape, dtype, op, backend, us, moved, rms in trace.rows():
        if narrow and name.startswith("layers."):
            layer, name = re.fullmatch(r"(layers\.\d+)\.(.*)", name).groups()
            if layer != last:
                rows.add_row(layer)
            name, last = f"  {name}", layer
        rows.add_row(
            name,
            letters,
            shape,
            op or backend,
            "" if us is None else f"{us:.1f}",
            "" if moved is None else size(moved),
            *(() if narrow else (dtype, backend, f"{rms:.3g}")),
        )
    return rows


def _likely(found: list[Prediction]) -> Table:
    rows = table("token", "id", "probability", numbers=True)
    for token in found:
        rows.add_row(_spelled(token.piece), str(token.id), f"{token.probability:.4g}")
    return rows


def _lens(trace: Trace) -> Table:
    rows = table("before layer", *map(str, range(1, 6)))
    for layer, found in enumerate(trace.by_layer(5)):
        name = str(layer) if layer < len(trace.lens) - 1 else "the model"
        rows.add_row(name, *(f"{_spelled(token.piece)} {token.probability:.2g}" for token in found))
    return rows


def _differences(comparison: Comparison) -> Table:
    rows = table("residual stream", "relative difference", "grown", numbers=True)
    for step in comparison.layers:
        grown = f"{step.grown:.3g} ×" if step.grown else ""
        rows.add_row(step.name, f"{step.relative:.3g}", grown)
    return rows
