"""The way back: the ids or the text that a model made become a message with its tool calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import PromptError
from .chat_messages import ROLES, Message
from .chat_parse import read_calls
from .chat_tools import as_tools
from .special_tokens import BOS, END_HEADER, EOM, EOS, EOT, PYTHON_TAG, START_HEADER
from .tokenizer import Tokenizer

_ENDS = {EOT: "eot", EOM: "eom", EOS: "eos"}
_HEADER = re.compile(
    rf"\A(?:{re.escape(BOS)})?{re.escape(START_HEADER)}(\w+){re.escape(END_HEADER)}(?:\n\n)?"
)


def decode_message(
    found: str | Sequence[int],
    tokenizer: Tokenizer | None = None,
    *,
    tools: Iterable[Any] | None = None,
) -> Message:
    """Returns the message of a model's ids, or of its text with the special tokens spelled.

    A header before it gives the role, which is else the assistant's. In ids only control tokens
    control; in text their spelling does. tools: the tools that the model was told of; their names
    tell a call without parameters from an answer in JSON.

    The message's calls are those after <|python_tag|> (code, or NAME.call(…)), JSON objects with a
    name and parameters, <function=NAME>{…}</function>, and lists of Python calls. Malformed ones
    stay in its content, and fault says why. Raises PromptError for ids without a tokenizer,
    TokenizerError for ids outside the vocabulary.
    """
    builtin, custom = as_tools(tools)
    names = frozenset([*builtin, *(tool.name for tool in custom)])
    role, body, code, end, fault = "assistant", "", None, None, None
    if isinstance(found, str):
        if head := _HEADER.match(found):
            role, found = head[1], found[head.end() :]
        cut = min((p, e) for e in (*_ENDS, "") if (p := found.find(e) if e else len(found)) >= 0)
        end, rest = _ENDS.get(cut[1]), found[cut[0] + len(cut[1]) :]
        body, tag, after = found[: cut[0]].partition(PYTHON_TAG)
        code = after if tag else None
        fault = f"{len(rest)} characters follow the end of the message" if rest.strip() else None
    else:
        if tokenizer is None:
            raise PromptError("decode_message of ids needs their tokenizer; give it, or text")
        role, body, code, end, fault = _split(list(found), tokenizer)
    if role not in ROLES:
        fault = f"the header has the role {role!r}; it is read as the assistant's"
        role = "assistant"
    if role != "assistant":
        return Message(role, body + (PYTHON_TAG + code if code is not None else ""), end=end)
    content, calls, why = read_calls(body, code, names)
    return Message(role, content, calls, end=end, fault=why or fault)


def _split(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str, str | None, Any, Any]:
    """Role, text before <|python_tag|>, text after it or None, end and fault of a message."""
    special, role = tokenizer.specials, "assistant"
    begin, start, close = (special.get(name) for name in (BOS, START_HEADER, END_HEADER))
    if ids and begin is not None and ids[0] == begin:
        ids = ids[1:]
    if ids and start is not None and ids[0] == start and close in ids:
        at = ids.index(close)
        role, ids = tokenizer.decode(ids[1:at]), ids[at + 1 :]
        blank = tokenizer.encode("\n\n")
        ids = ids[len(blank) :] if ids[: len(blank)] == blank else ids
    ends = {special[name]: end for name, end in _ENDS.items() if name in special}
    ends |= {id_: "eos" for id_ in tokenizer.stop_ids if id_ not in ends}
    at = next((n for n, id_ in enumerate(ids) if id_ in ends), len(ids))
    fault = f"{len(ids) - at - 1} tokens follow the end of the message" if at + 1 < len(ids) else ""
    end = ends[ids[at]] if at < len(ids) else None
    body, tag, code = ids[:at], special.get(PYTHON_TAG), None
    if tag is not None and tag in body:
        code = tokenizer.decode(body[body.index(tag) + 1 :])
        body = body[: body.index(tag)]
    return role, tokenizer.decode(body), code, end, fault or None
