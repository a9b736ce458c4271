"""What a line that begins with "/" does in a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import JSON_ERRORS, CheckpointError, LlamaFastError
from ..utils.files import atomic_file
from .options import file_to_write
from .terminal import note, note_pairs, text_or_file

if TYPE_CHECKING:
    from .chat_talk import Talk

# Beside a dialog's file: its keys and values.
CACHE_SUFFIX = ".cache"


def help_(talk: Talk, text: str) -> None:
    """show these commands"""
    note_pairs(
        [(usage, command.__doc__) for usage, command in COMMANDS.values()]
        + [("//…", "a message that begins with a slash")]
    )


def reset(talk: Talk, text: str) -> None:
    """begin anew; the system message stays"""
    talk.chat.reset()
    note("The dialog is empty.")


def system(talk: Talk, text: str) -> None:
    """show the system message; with TEXT or @FILE set it; with - take it out"""
    if text:
        talk.chat.set_system(None if text == "-" else text_or_file(text, "/system"))
    found = talk.chat.system
    note("There is no system message." if found is None else f"System message: {found}")


def undo(talk: Talk, text: str) -> None:
    """take back your last message and its answer"""
    taken = talk.chat.undo()
    note("There is nothing to take back." if taken is None else f"Taken back: {taken}")


def retry(talk: Talk, text: str) -> None:
    """answer your last message once more"""
    taken = talk.chat.undo()
    if taken is None:
        note("There is no message to answer.")
    else:
        talk.say(taken)


def save(talk: Talk, text: str) -> None:
    """write the dialog to FILE, and its keys and values to FILE.cache"""
    if not text:
        raise LlamaFastError("/save needs the name of a file: /save dialog.json")
    note(save_dialog(talk, Path(text)))


def load(talk: Talk, text: str) -> None:
    """go on with the dialog of FILE"""
    if not text:
        raise LlamaFastError("/load needs the name of a file: /load dialog.json")
    note(load_dialog(talk, Path(text)))


def tokens(talk: Talk, text: str) -> None:
    """show the dialog as the model reads it"""
    if not talk.chat.turns:
        note("The dialog is empty.")
        return
    ids = talk.chat.ids(answering=False)
    tokenizer = talk.session.tokenizer
    note(" ".join(map(str, ids)))
    note(tokenizer.decode(ids))
    note(f"{len(ids)} tokens")


def stats(talk: Talk, text: str) -> None:
    """show what the dialog and its answers took"""
    note_pairs(talk.stats())


def quit_(talk: Talk, text: str) -> None:
    """end the chat"""
    raise EOFError


Command = Callable[["Talk", str], None]
COMMANDS: dict[str, tuple[str, Command]] = {
    "help": ("/help", help_),
    "reset": ("/reset", reset),
    "system": ("/system [TEXT]", system),
    "undo": ("/undo", undo),
    "retry": ("/retry", retry),
    "save": ("/save FILE", save),
    "load": ("/load FILE", load),
    "tokens": ("/tokens", tokens),
    "stats": ("/stats", stats),
    "quit": ("/quit", quit_),
}


def run(talk: Talk, line: str) -> None:
    """Runs the command of a line that begins with "/". Raises LlamaFastError for another, EOFError
    at the end of the chat."""
    name, _, text = line[1:].partition(" ")
    if name not in COMMANDS:
        raise LlamaFastError(
            f"/{name} is no command; there are {', '.join(f'/{name}' for name in COMMANDS)}. "
            "A message that begins with a slash is written //…"
        )
    COMMANDS[name][1](talk, text.strip())


def save_dialog(talk: Talk, path: Path) -> str:
    """Writes the dialog, its keys and values but for a model over ranks; returns what was
    written."""
    from ..distributed.tensor_parallel import share_of
    from ..generation.session_file import save_session

    turns = [
        turn.message.as_dict() | ({} if turn.made is None else {"ids": list(turn.made)})
        for turn in talk.chat.turns
    ]
    if not turns:
        raise LlamaFastError("there is nothing to save; the dialog is empty")
    lines = ",\n".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
    with atomic_file(path) as beside:
        beside.write_text(f'{{"messages": [\n{lines}\n]}}\n', "utf-8")
    told = f"{len(turns)} messages were saved to {path}"
    if talk.session.tokens and share_of(talk.session.model) is None:
        held = save_session(talk.session, cache_of(path))
        told += f", keys and values of {held} tokens to {cache_of(path)}"
    return told + "."


def load_dialog(talk: Talk, path: Path) -> str:
    """Goes on with a saved dialog, and with its keys and values where they are there and of this
    model; returns what was read. Raises LlamaFastError for a file that is no dialog."""
    from ..generation.chat import Turn
    from ..generation.session_file import load_session
    from ..tokenizer import Message

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        turns = []
        for entry in content["messages"]:
            made = tuple(map(int, entry["ids"])) if "ids" in entry else None
            turns.append(Turn(Message.from_dict(entry), made))
    except OSError as error:
        raise LlamaFastError(f"{path} cannot be read ({error.strerror})") from error
    except (*JSON_ERRORS, LlamaFastError, KeyError, TypeError, ValueError) as error:
        raise LlamaFastError(f"{path} is no dialog that /save wrote ({error})") from error
    known = talk.session.tokenizer.vocab_size
    if any(not 0 <= id_ < known for turn in turns for id_ in turn.made or ()):
        # Of another model: its answers are read as texts.
        turns = [Turn(turn.message) for turn in turns]
    talk.chat.turns = turns
    told = f"{len(turns)} messages were read from {path}"
    try:
        held = load_session(talk.session, cache_of(path))
        return f"{told}, keys and values of {held} tokens from {cache_of(path)}."
    except CheckpointError as error:
        why = f": {error}" if cache_of(path).exists() else "."
        return f"{told}; the model reads them anew{why}"


def files_to_write(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of --save-cache: refuses, before the dialog, files that could not be written."""
    if value is not None:
        file_to_write(parameter, [value, cache_of(value)])
    return value


def cache_of(path: Path) -> Path:
    return path.with_name(path.name + CACHE_SUFFIX)
