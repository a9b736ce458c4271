"""Where a chat is read from and written to: a terminal with a line editor, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from .terminal import BYTE_ORDER_MARK, note

# One line a message; a line that ends with this goes on in the next.
CONTINUED = "\\"
HISTORY = "chat_history"


class Screen:
    """Reads messages and writes answers.

    On a terminal, with editing, a history that lasts, and a line at the bottom with what `status`
    returns; Alt-Enter begins a new line, and so does a line that ends with a backslash. From a pipe
    each line is a message.
    """

    def __init__(self, status: Callable[[], str]) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._session = _line_editor(status) if self.interactive else None

    def read(self) -> str | None:
        """Returns the next message, None at the end of input. On a terminal Ctrl-C empties the line
        and Ctrl-D ends."""
        lines: list[str] = []
        while True:
            line = self._line("> " if not lines else "… ")
            if line is None:
                return "\n".join(lines) if lines else None
            if line.endswith(CONTINUED):
                lines.append(line[:-1])
                continue
            return "\n".join([*lines, line])

    def _line(self, mark: str) -> str | None:
        if self._session is not None:
            while True:
                try:
                    return self._session.prompt(mark)
                except KeyboardInterrupt:
                    note("(Ctrl-D or /quit ends the chat)")
                except EOFError:
                    return None
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removeprefix(BYTE_ORDER_MARK).rstrip("\r\n") if line else None

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def ask(self, question: str) -> str:
        """Returns the answer to a question, in small letters; nothing where nobody can be asked."""
        if not self.interactive:
            return ""
        try:
            return input(f"{question} ").strip().lower()
        except EOFError:
            return ""


def _line_editor(status: Callable[[], str]):
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    file = history_file()
    return PromptSession(
        history=FileHistory(str(file)) if file else InMemoryHistory(),
        key_bindings=keys,
        bottom_toolbar=lambda: FormattedText([("", status())]),
        prompt_continuation="… ",
    )


def history_file() -> Path | None:
    """Returns the file of what was typed, readable by its owner alone; None where there can be
    none."""
    file = Path(typer.get_app_dir("llama-fast")) / HISTORY
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return None
    return file
