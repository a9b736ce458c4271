"""`llama-fast vocab train`: a vocabulary with more tokens, learnt from a corpus."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Debug, example, model_folder, new_folder
from .terminal import every, note, show, table

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SHOWN = 12  # new tokens
SECONDS = 5.0  # between two lines of progress

Corpus = Annotated[
    list[Path],
    typer.Argument(
        metavar="CORPUS...",
        help="Text files (.txt, .md), JSON files as for fine-tuning, or folders of them.",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Folder to write; a new one.", callback=new_folder),
]


@example("llama-fast vocab train corpus.txt --base MODEL --tokens 5000 --out longer")
def train(
    corpus: Corpus,
    out: Out,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many new tokens.")] = 5000,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of the model, or of a tokenizer, whose vocabulary is made longer.",
            show_default="the small model that ships",
        ),
    ] = None,
    min_count: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="How often the pair that becomes a token must occur."
        ),
    ] = 2,
    max_chars: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The longest new token: where a corpus repeats whole clauses, they become tokens.",
            show_default="any length",
        ),
    ] = None,
    chars_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCRIPT",
            help="Make tokens of this script's characters alone (Han, Cyrillic, …). May be given "
            "several times.",
        ),
    ] = None,
    reserved: Annotated[
        bool,
        typer.Option(
            "--reserved",
            help="Use the ids of the reserved special tokens first, so that some 245 tokens need "
            "no new rows.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Learn new tokens from a corpus, on top of a model's vocabulary.

    Training of the byte-pair encoding goes on where it ended: no old id changes, and any text's new
    tokens only join old ones. The result is a tokenizer.json, for `llama-fast vocab extend`.
    """
    from ..checkpoint.vocabulary_settings import write_tokenizer_folder
    from ..tokenizer import vocabulary
    from ..training.texts import read_texts
    from ..utils.files import atomic_folder

    folder = model_folder(base)
    old = tokenizer_of(folder)
    start = time.perf_counter()
    longer = vocabulary.extend(
        old,
        read_texts(corpus),
        tokens,
        min_count=min_count,
        max_chars=max_chars,
        scripts=chars_only or (),
        use_reserved=reserved,
        progress=_lines(),
    )
    seconds = time.perf_counter() - start
    with atomic_folder(out) as partial:
        write_tokenizer_folder(partial, longer, folder if folder.is_dir() else folder.parent)
    new = vocabulary.new_tokens(longer, old)
    rows = table("id", "new token", "old tokens")
    for id_ in list(new)[:SHOWN]:
        parts = [piece(old.id_to_bytes[part]) for part in new[id_]]
        rows.add_row(str(id_), piece(longer.id_to_bytes[id_]), " + ".join(parts))
    show(f"The first of {len(new):,} new tokens", rows)
    note(
        f"wrote {out}: {len(new):,} new tokens in {seconds:.1f} s, {longer.vocab_size:,} in all; "
        f"see how it fits: llama-fast vocab report {folder} {out} TEXT"
    )


def tokenizer_of(path: Path) -> Tokenizer:
    """Returns the tokenizer of a folder or of a file."""
    from ..tokenizer import Tokenizer

    return Tokenizer.from_pretrained(path) if path.is_dir() else Tokenizer.from_file(path)


def piece(token: bytes) -> str:
    """Returns a token as Python writes text, or bytes where it is no whole character."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def _lines() -> Callable[[int, int], None]:
    """Returns what notes now and then how many tokens are found."""
    due = every(SECONDS)

    def advance(done: int, total: int) -> None:
        if due():
            note(f"{done:,} of {total:,} tokens")

    return advance
