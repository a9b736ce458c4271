"""`llama-fast vocab report`: how vocabularies fit texts, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Debug, example, file_to_write
from .terminal import show, table
from .units import write_json
from .vocab_train import tokenizer_of

if TYPE_CHECKING:
    from ..tokenizer.vocabulary_report import Fit, Report


@example("llama-fast vocab report MODEL longer corpus.txt --plot fit.png")
def report(
    given: Annotated[
        list[Path],
        typer.Argument(
            metavar="TOKENIZER [OTHER] TEXT...",
            help="Folder of a model or of a tokenizer, or its file; another one to compare with; "
            "and text files, JSON files or folders of them.",
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="A picture; needs matplotlib.", callback=file_to_write
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="All figures, for programs.", callback=file_to_write
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show how a vocabulary fits texts: tokens, bytes and characters a token, by script.

    Pieces of a character are tokens that are no whole character by themselves. With two
    vocabularies, each row has both.
    """
    from ..tokenizer.vocabulary_report import measure
    from ..training.texts import read_texts

    n = 2 if len(given) > 2 and _is_tokenizer(given[1]) else 1
    tokenizers, texts = given[:n], given[n:]
    if not texts:
        raise typer.BadParameter(
            "no texts are given after the tokenizer. Write: llama-fast vocab report "
            f"{' '.join(map(str, tokenizers))} TEXT",
            param_hint="TEXT",
        )
    names = [path.name or str(path) for path in tokenizers]
    if len(set(names)) < n:
        names = [str(path) for path in tokenizers]
    found = {
        name: measure(tokenizer_of(path), read_texts(texts))
        for name, path in zip(names, tokenizers, strict=True)
    }
    _show(found)
    if json is not None:
        write_json(json, {name: asdict(one) for name, one in found.items()})
    if plot is not None:
        from ..tokenizer.vocabulary_plot import plot as draw

        draw(found, plot)


def _is_tokenizer(path: Path) -> bool:
    from ..tokenizer.special_tokens import TOKENIZER_FILES

    if path.is_dir():
        return any((path / name).is_file() for name in TOKENIZER_FILES)
    return path.suffix == ".model" or path.name == "tokenizer.json"


def _show(found: dict[str, Report]) -> None:
    rows = table("", "vocabulary", "used", "lines", "tokens", "tokens/line", numbers=True)
    for name, one in found.items():
        rows.add_row(
            name,
            f"{one.vocab_size:,}",
            f"{one.used:,}",
            f"{one.lines:,}",
            f"{one.all.tokens:,}",
            f"{one.tokens_per_line:,.1f}",
        )
    first, *others = found.values()
    if others:
        ratio = others[0].all.tokens / first.all.tokens
        show(rows, f"The second needs {ratio:.3f} × the tokens of the first.\n")
    else:
        show(rows)
    rows = table(
        "script", "vocabulary", "tokens", "bytes/token", "characters/token",
        "pieces of a character", numbers=True, texts=2,
    )  # fmt: skip
    for script in dict.fromkeys(["all", *(s for one in found.values() for s in one.by_script)]):
        for n, (name, one) in enumerate(found.items()):
            fits = {"all": one.all, **one.by_script}
            if script in fits:
                rows.add_row(script if n == 0 else "", name, *_cells(fits[script]))
    show(rows)
    for name, one in found.items():
        words = ", ".join(f"{word!r} ({count:,})" for word, count in one.longest)
        show(f"Longest tokens of {name}, and how often they occur: {words}")


def _cells(fit: Fit) -> list[str]:
    return [
        f"{fit.tokens:,}",
        f"{fit.bytes_per_token:.2f}",
        f"{fit.characters_per_token:.2f}",
        f"{fit.fallback_share:.1%}",
    ]
