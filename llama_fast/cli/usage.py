"""The texts of usage errors: which option, why not, and what to write instead.

typer finds these errors, and hands on the words of the library that it checks values with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def usage_line(error: Any) -> str:
    """Returns the line for one of typer's usage errors."""
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    if own := _own_words(error):
        text = text.replace(" ".join(error.message.split()), own)
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    hints = [f"see: {context.command_path} --help"]
    if "Missing" in type(error).__name__ and context.command.epilog:
        hints.insert(0, context.command.epilog[0].lower() + context.command.epilog[1:])
    if "No such command" in text or "Missing command" in text:
        commands = context.command.commands
        hints.insert(0, f"there are {', '.join(commands)}")
    return f"{text} ({'; '.join(hints)})"


def _own_words(error: Any) -> str:
    """Returns what to say of a number that is none or too large or small; nothing for other
    errors."""
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return ""
    found: Mapping[str, Any] = details()[0]
    kind, value, limits = found["type"], found["input"], found.get("ctx", {})
    if kind == "greater_than_equal":
        return f"{value} is too small; write {_plain(limits['ge'])} or more"
    if kind == "less_than_equal":
        return f"{value} is too large; write {_plain(limits['le'])} or less"
    if kind.startswith("int_"):
        return f"{value!r} is no whole number"
    if kind.startswith(("float_", "finite_")):
        return f"{value!r} is no number"
    return ""


def _plain(number: float) -> str:
    return f"{number:.0f}" if number == int(number) else f"{number}"
