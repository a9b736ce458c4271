"""Calls of tools as the text that a model writes. `chat_parse` is the way back."""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .chat_messages import BUILTIN_TOOLS, CODE, ToolCall

# Kinds of calls that follow <|python_tag|>, and of which a message holds one.
AFTER_PYTHON_TAG = ("builtin", "code")


def json_text(value: Any, of_what: str, **settings: Any) -> str:
    """Returns a value as JSON, other scripts as they are. Raises PromptError where JSON has no
    such value."""
    try:
        return json.dumps(value, ensure_ascii=False, **settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{of_what} cannot be written as JSON: {error}") from None


def write_calls(calls: Sequence[ToolCall], style: str, typed: bool = True) -> str:
    """Returns calls of one style as text: "json" (with "type": "function" where `typed`), "tag",
    "python_list", "builtin" or "code". Raises PromptError for what a style cannot hold."""
    if style in AFTER_PYTHON_TAG and len(calls) > 1:
        raise PromptError(
            f"{len(calls)} calls in one message, of which one is written as {style}; "
            "such a call stands alone: give each its own message"
        )
    if style == "json":
        return "; ".join(_json(call, typed) for call in calls)
    if style == "tag":
        return "\n".join(map(_tag, calls))
    if style == "python_list":
        return f"[{', '.join(map(_python, calls))}]"
    if style == "builtin":
        return _builtin(calls[0])
    return _code(calls[0])


def _arguments(call: ToolCall) -> str:
    return json_text(dict(call.arguments), f"the arguments of a call of {call.name}")


def _json(call: ToolCall, typed: bool) -> str:
    kind = '"type": "function", ' if typed else ""
    name = json_text(call.name, "the name of a tool")
    return f'{{{kind}"name": {name}, "parameters": {_arguments(call)}}}'


def _tag(call: ToolCall) -> str:
    if ">" in call.name or call.name != call.name.strip():
        raise PromptError(
            f"the tool {call.name!r} cannot be called as <function=NAME>; "
            'use kind="json", or another name'
        )
    return f"<function={call.name}>{_arguments(call)}</function>"


def is_name(text: str) -> bool:
    """Whether a text can be the name of a Python function or parameter, dots between names."""
    return all(p.isidentifier() and not keyword.iskeyword(p) for p in text.split("."))


def _python(call: ToolCall) -> str:
    for name in (call.name, *call.arguments):
        if not is_name(name) or not name.isascii() or ("." in name and name is not call.name):
            raise PromptError(
                f"{name!r} is no name in Python, so the call of {call.name} cannot be written in a "
                'list of Python calls; use kind="json"'
            )
    parts = (f"{key}={_literal(value, call.name)}" for key, value in call.arguments.items())
    return f"{call.name}({', '.join(parts)})"


def _literal(value: Any, name: str) -> str:
    """Returns a JSON value as Python writes it."""
    if value is None or isinstance(value, str | bool | int):
        return repr(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item, name) for item in value)}]"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = (f"{key!r}: {_literal(item, name)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    raise PromptError(f"an argument of a call of {name} is {value!r}, which JSON has not")


def _builtin(call: ToolCall) -> str:
    if call.name not in BUILTIN_TOOLS:
        raise PromptError(
            f'a call of {call.name} has kind="builtin"; those are {", ".join(BUILTIN_TOOLS)}'
        )
    parts = []
    for key, value in call.arguments.items():
        if not (is_name(key) and key.isascii() and "." not in key):
            raise PromptError(f"{key!r} cannot be a parameter of {call.name}")
        # Double quotes, as the models were taught; a quote inside is escaped.
        quoted = isinstance(value, str)
        text = json_text(value, f"{key} of {call.name}") if quoted else _literal(value, call.name)
        parts.append(f"{key}={text}")
    return f"{call.name}.call({', '.join(parts)})"


def _code(call: ToolCall) -> str:
    code = call.arguments.get("code")
    if call.name != CODE or call.arguments.keys() != {"code"} or not isinstance(code, str):
        raise PromptError(
            f'a call of {call.name} with kind="code" has the arguments {sorted(call.arguments)}; '
            f'code for the interpreter is ToolCall("{CODE}", {{"code": TEXT}})'
        )
    return code
