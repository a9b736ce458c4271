"""`llama-fast vocab extend`: a model with rows for a longer vocabulary."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .convert import report_written
from .loading import load_model
from .options import Debug, Threads, example, set_threads
from .terminal import every, note, weights_bar
from .vocab_train import SECONDS, Out, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizer import Tokenizer


class Init(str, Enum):
    mean = "mean"
    distill = "distill"


@example("llama-fast vocab extend MODEL longer --out longer-model")
def extend(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model to read.")],
    vocab: Annotated[
        Path,
        typer.Argument(
            metavar="VOCAB", help="Folder that vocab train wrote, or its tokenizer.json."
        ),
    ],
    out: Out,
    init: Annotated[
        Init,
        typer.Option(
            help="mean: a new row is the mean of the old tokens that spell it. distill: then the "
            "new input rows are trained to give the hidden states of the old spelling."
        ),
    ] = Init.mean,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CORPUS",
            help="For --init distill: texts that hold the new tokens. May be given several times.",
        ),
    ] = None,
    snippets: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="For --init distill: texts for each new token."),
    ] = 100,
    lr: Annotated[
        float, typer.Option("--lr", min=0, metavar="LR", help="For --init distill.")
    ] = 1e-4,
    multiple: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Pad the rows to a multiple; the padding is never drawn."
        ),
    ] = 64,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Give a model rows for a longer vocabulary.

    Old rows keep every bit, and a head that is the embedding stays it. The new folder is in Hugging
    Face's format, whichever MODEL has: Meta's tokenizer.model cannot hold tokens after the special
    ones. It appears whole, or not at all.
    """
    if (init is Init.distill) != bool(texts):
        if texts:
            raise typer.BadParameter(
                "it is for --init distill. Write: --init distill", param_hint="--texts"
            )
        raise typer.BadParameter(
            "distill learns from texts that hold the new tokens. Write: --texts CORPUS",
            param_hint="--init",
        )
    set_threads(threads)
    from ..checkpoint.vocabulary import extend_folder

    longer = tokenizer_of(vocab)
    start = time.perf_counter()
    rows = _distilled(model, longer, texts, snippets, lr) if texts else None
    with weights_bar(f"Writing {out.name}", lines=True) as progress:
        new = extend_folder(
            model, longer, out, multiple=multiple, input_rows=rows, progress=progress
        )
    report_written(out, start)
    note(f"{len(new):,} new tokens, {longer.vocab_size:,} in all")


def _distilled(
    model: Path, longer: Tokenizer, texts: list[Path], snippets: int, lr: float
) -> Tensor:
    """The new input rows (n,C)."""
    from ..tokenizer import Tokenizer
    from ..training import vocabulary
    from ..training.texts import read_texts

    old = Tokenizer.from_pretrained(model)
    vocabulary.new_tokens(longer, old)  # raises before the weights are loaded
    llama = load_model(model)
    ids = vocabulary.resize(llama, longer, old=old)
    due = every(SECONDS)

    def lines(done: int, steps: int, loss: float) -> None:
        if due():
            note(f"step {done:,} of {steps:,}: loss {loss:.3g}")

    found = vocabulary.distill(
        llama, old, longer, read_texts(texts), snippets=snippets, lr=lr, progress=lines
    )
    note(
        f"distilled {found.seen:,} of {len(ids):,} new tokens in {found.steps:,} steps: the error "
        f"of the hidden states went from {found.first:.3g} to {found.last:.3g}"
    )
    return llama.embed.weight.detach()[ids].cpu()
