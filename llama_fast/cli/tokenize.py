"""`llama-fast tokenize`: how a text is cut into tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Debug, Model, example, model_folder
from .terminal import note, text_or_stdin


@example('llama-fast tokenize "Once upon a time"')
def tokenize(
    text: Annotated[
        str | None,
        typer.Argument(help="The text.", show_default="standard input, if it is a pipe"),
    ] = None,
    model: Model = None,
    special: Annotated[
        bool,
        typer.Option(
            "--special",
            help="Special tokens spelled in the text, as <|eot_id|>, become their ids; otherwise "
            "they are text like any other.",
        ),
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Only the ids, in one line.")] = False,
    debug: Debug = False,
) -> None:
    """Show the token ids of a text, each with its piece.

    Pieces are written as Python writes text, and as bytes where a token is no whole character.
    """
    from ..tokenizer import Tokenizer

    text = text_or_stdin(text, "llama-fast tokenize")
    tokenizer = Tokenizer.from_pretrained(model_folder(model))
    found = tokenizer.encode(text, allowed_special="all" if special else ())
    if ids:
        print(*found)
        return
    width = len(str(tokenizer.vocab_size - 1))
    for id_ in found:
        print(f"{id_:>{width}}  {_piece(tokenizer.id_to_bytes[id_])}")
    note(f"{len(found)} tokens of {len(text)} characters")


def _piece(token: bytes) -> str:
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)
