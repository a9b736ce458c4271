"""The texts that tell a model of its tools.

Hugging Face's form needs the words of the release's template, for its ids to be those of the
template. Meta's form leaves the words to the application; these are this package's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from .chat_calls import json_text
from .chat_tools import ToolDefinition

DATE = "26 Jul 2024"  # of the templates of 3.1 and 3.3 where they are given none

_HF = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)
_HOW = {
    "json": 'To call a function, answer with nothing but JSON of the form {"type": "function", '
    '"name": NAME, "parameters": {ARGUMENT: VALUE}}; put "; " between several calls.',
    "tag": "To call a function, answer with nothing but <function=NAME>{ARGUMENT: VALUE}</function>"
    ", where the braces hold JSON; write each call on a line of its own.",
    "python_list": "To call functions, answer with nothing but a list of calls in Python's syntax: "
    "[NAME(ARGUMENT=VALUE, ...), ...]. Every argument is named.",
}


def hf_tools_text(tools: Sequence[ToolDefinition]) -> str:
    """Returns what the templates of 3.1 and later put before the first user message."""
    listed = (json_text(t.as_dict(), f"tool {t.name}", indent=4) + "\n\n" for t in tools)
    return _HF + "".join(listed)


def custom_tools_text(tools: Sequence[ToolDefinition], style: str) -> str:
    """Returns what Meta's form puts into the system message: the functions as JSON, one a line, and
    how to call them ("json", "tag" or "python_list")."""
    listed = "\n".join(json_text(t.function(), f"tool {t.name}") for t in tools)
    return (
        f"You can call these functions, described in JSON:\n{listed}\n\n{_HOW[style]} "
        "When no function helps, answer in words."
    )
