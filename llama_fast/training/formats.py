"""The formats of training data, told by the keys of a row.

text                                plain text
instruction, input?, output         alpaca; system?, history? (pairs of a question and an answer)
conversations: [{from, value}]      ShareGPT; system?, tools?
messages: [{role, content}]         OpenAI, content parts and tool_calls included; tools?
prompt, completion                  two texts, or two lists of messages
prompt, chosen, rejected            preferences, for DPO; or conversations, or instruction, in
                                    the prompt's place
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JSON_ERRORS, DataError, PromptError
from ..tokenizer import Message, ToolCall
from ..tokenizer.chat_messages import order_fault
from ..tokenizer.chat_tools import as_tools
from .rows import Raw, data_files, raw_rows


@dataclass(frozen=True)
class Document:
    """A plain text."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A text and what is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Dialog:
    """Messages, and the tools that the assistant was told of. first: the index from which on the
    assistant's messages are answers to train on."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, each with it a Dialog or a Completion: the better, the worse."""

    chosen: Dialog | Completion
    rejected: Dialog | Completion


Row = Document | Completion | Dialog | Preference

SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "observation": "ipython", "tool": "ipython"},
    "function_call": "assistant",
}


def parse_row(value: Any) -> Row:
    """Returns the row of a JSON value. Raises DataError or PromptError, without a place, for what
    is of no known format and for a dialog whose messages are out of order or whose answers are
    empty."""
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise DataError(f"a row is {_kind(value)}; an object with named values is needed")
    if "chosen" in value and "rejected" in value:
        return Preference(*(_answer(value, key) for key in ("chosen", "rejected")))
    if "messages" in value:
        messages = [Message.from_dict(m) for m in _list(value, "messages")]
        return _dialog(_with_system(value, messages), value)
    if "conversations" in value:
        messages = [_sharegpt(turn) for turn in _list(value, "conversations")]
        return _dialog(_with_system(value, messages), value)
    if "prompt" in value and "completion" in value:
        return _answer(value, "completion")
    if "instruction" in value and "output" in value:
        return _alpaca(value)
    if "text" in value:
        return Document(_text(value, "text", needed=True))
    raise DataError(
        f"the keys {', '.join(map(str, list(value)[:8])) or 'of the row, none,'} are of no known "
        "format; known are text; instruction and output; conversations; messages; prompt and "
        "completion; prompt, chosen and rejected"
    )


def read_preferences(paths: Any) -> Iterator[Preference]:
    """Yields the rows of files of preferences. Raises DataError (file, line) for anything else."""
    for path in data_files(paths):
        for line, row in parsed(path, raw_rows(path, path.read_bytes())):
            if not isinstance(row, Preference):
                raise DataError(
                    "the row is no preference: prompt, chosen and rejected are needed", path, line
                )
            yield row


def parsed(path: Path, rows: Iterable[Raw]) -> Iterator[tuple[int, Row]]:
    """Yields a file's rows with their lines. Raises DataError (file, line) for the first fault."""
    for raw in rows:
        if raw.fault is not None:
            raise DataError(raw.fault, path, raw.line)
        try:
            row = parse_row(raw.value)
        except (DataError, PromptError) as error:
            raise DataError(str(error), path, raw.line) from None
        yield raw.line, row


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        list: "a list",
        dict: "an object",
        type(None): "null",
        bool: "a boolean",
    }
    return names.get(type(value), "a number")


def _text(row: Mapping[str, Any], key: str, needed: bool = False) -> str:
    """A text of a row; missing and null are empty."""
    value = row.get(key)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise DataError(f"{key} is {_kind(value)}; a text is needed")
    if needed and not value.strip():
        raise DataError(f"{key} is empty")
    return value


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key} is {_kind(value)}; a list of messages is needed")
    return value


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = _text(row, "system")
    return [Message("system", system), *messages] if system else messages


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row's tools, which may be JSON text, or missing."""
    tools = row.get("tools") or ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except JSON_ERRORS as error:
            raise DataError(f"tools is a text, and no JSON ({error})") from None
    if not isinstance(tools, list | tuple):
        raise DataError(f"tools is {_kind(tools)}; a list is needed")
    builtin, custom = as_tools(tools)
    return (*builtin, *custom)


def _dialog(messages: list[Message], row: Mapping[str, Any], first: int = 0) -> Dialog:
    fault = order_fault(messages)
    if fault is None:
        fault = next(
            (
                f"message {n} is an empty answer"
                for n, message in enumerate(messages, 1)
                if message.role == "assistant"
                and not message.tool_calls
                and not message.content.strip()
            ),
            None,
        )
    if fault is None and not any(message.role == "assistant" for message in messages[first:]):
        fault = "the dialog has no answer to train on"
    if fault:
        raise DataError(fault)
    return Dialog(tuple(messages), _tools(row), first)


def _sharegpt(turn: Any) -> Message:
    if isinstance(turn, Mapping) and "role" in turn and "content" in turn:
        return Message.from_dict(turn)
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError("an entry of conversations lacks from and value")
    role, value = turn["from"], _text(turn, "value")
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        raise DataError(
            f"conversations has a message from {role!r}; known are {', '.join(SHAREGPT_ROLES)}"
        )
    if role != "function_call":
        return Message(SHAREGPT_ROLES[role], value)
    try:
        calls = json.loads(value)
    except JSON_ERRORS as error:
        raise DataError(f"the value of a function_call is no JSON ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    return Message("assistant", "", tuple(map(ToolCall.from_dict, calls)))


def _alpaca(row: Mapping[str, Any]) -> Dialog:
    messages = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("history is no list of pairs of a question and an answer")
        question, answer = ({"history": part} for part in pair)
        messages += [Message("user", _text(question, "history"))]
        messages += [Message("assistant", _text(answer, "history"))]
    asked = [_text(row, "instruction"), _text(row, "input")]
    asked = "\n".join(part for part in asked if part)
    if not asked.strip():
        raise DataError("instruction is empty")
    messages += [Message("user", asked), Message("assistant", _text(row, "output", needed=True))]
    return _dialog(_with_system(row, messages), row)


def _answer(row: Mapping[str, Any], key: str) -> Dialog | Completion:
    """The prompt with one of its answers: both texts, both lists of messages, or a dialog of
    ShareGPT's or a question of alpaca's with its answer."""
    prompt, answer = row.get("prompt"), row[key]
    if "conversations" in row:
        before = _list(row, "conversations")
        messages = [_sharegpt(turn) for turn in (*before, answer)]
        return _dialog(_with_system(row, messages), row)
    if "instruction" in row and prompt is None:
        return _alpaca({**row, "output": answer})
    if isinstance(answer, list):
        # The prompt of a preference may be a part of both of its answers, and a text besides.
        messages = [Message.from_dict(m) for m in _list(row, key)]
        before = [] if prompt is None or isinstance(prompt, str) else _list(row, "prompt")
        before = [Message.from_dict(m) for m in before]
        if isinstance(prompt, str) and messages[0].role == "assistant":
            before = [Message("user", prompt)]
        messages = [*before, *messages]
        return _dialog(_with_system(row, messages), row, len(before))
    return Completion(_text(row, "prompt"), _text(row, key, needed=True))
