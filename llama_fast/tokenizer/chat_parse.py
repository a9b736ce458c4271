"""Calls of tools, read from the text that a model made. `chat_calls` writes them.

Nothing here raises for what a model wrote: what looks like a call and is none stays text, with the
reason.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from itertools import islice
from typing import Any

from ..errors import JSON_ERRORS
from .chat_messages import BUILTIN_TOOLS, CODE, ToolCall
from .special_tokens import PYTHON_TAG

_TAG = re.compile(r"<function=([^>\n]+)>")
_BUILTIN = re.compile(rf"({'|'.join(BUILTIN_TOOLS)})\.call\(")
_RAW_ARGUMENT = re.compile(r"\w+\.call\((\w+)=\"(.*)\"\)", re.DOTALL)
_LIKE_LIST = re.compile(r"\[\s*[^\W\d][\w.]*\(")
_LIKE_JSON = re.compile(r'\[?\s*\{\s*"(?:type|name|function)"')
# Keys of a call. More would be lost, so such an object is no call.
_KEYS = {"type", "name", "parameters", "arguments", "id", "function"}
_MOST_TRIES = 16  # lines that look like calls; more would take time that grows with their square
_WORDS = {"true": True, "false": False, "null": None}
# What ast and json raise for text that is no Python, no JSON, or too deep for them.
_NO_PYTHON = (*JSON_ERRORS, SyntaxError, MemoryError, TypeError)


class NoCall(Exception):
    """Text that is no call; says why."""


def read_calls(
    text: str, code: str | None, names: frozenset[str] = frozenset()
) -> tuple[str, tuple[ToolCall, ...], str | None]:
    """Returns the content, the calls and the fault of an assistant's text.

    code: what follows <|python_tag|>, None without one.
    """
    if code is not None:
        calls, fault = _after_python_tag(code, names)
        return (text, calls, None) if calls else (text + PYTHON_TAG + code, (), fault)
    if "<function=" in text:
        return _tagged(text)
    if not any(mark in text for mark in ('{"', "{ ", "{\n", "[")):
        return text, (), None
    fault = None
    # The whole text, or the lines from one on to the end: text before a call is content.
    starts = (m.end() for m in re.finditer(r"\A\s*|\n[ \t]*", text))
    likely = (at for at in starts if _LIKE_JSON.match(text, at) or _LIKE_LIST.match(text, at))
    for at in islice(likely, _MOST_TRIES):
        for looks, read in ((_LIKE_JSON, _json_calls), (_LIKE_LIST, _python_calls)):
            if not looks.match(text, at):
                continue
            try:
                calls = read(text[at:], names)
            except NoCall as error:
                fault = fault or str(error)
            else:
                before = text[:at].rstrip(" \t")
                return before.removesuffix("\n") if before.strip() else "", calls, None
    return text, (), fault


def _after_python_tag(code: str, names: frozenset[str]) -> tuple[tuple[ToolCall, ...], str | None]:
    """The calls of what follows <|python_tag|>, or why there are none."""
    text = code.strip()
    if not text:
        return (), f"nothing follows {PYTHON_TAG}"
    if text.startswith("<function="):
        content, calls, fault = _tagged(text)
        return ((), fault or "text stands between the calls") if content or fault else (calls, None)
    try:
        if _BUILTIN.match(text):
            return (_builtin_call(text),), None
        if _LIKE_JSON.match(text):
            return _json_calls(text, names), None
    except NoCall as error:
        return (), str(error)
    try:
        if _LIKE_LIST.match(text):
            return _python_calls(text, names), None
    except NoCall:
        pass  # code for the interpreter may be a list too
    return (ToolCall(CODE, {"code": code}, "code"),), None


def _tagged(text: str) -> tuple[str, tuple[ToolCall, ...], str | None]:
    """As read_calls, for <function=NAME>{…}</function>: a malformed one stays in the content."""
    calls: list[ToolCall] = []
    outside: list[str] = []
    start, fault = 0, None
    for tag in _TAG.finditer(text):
        if tag.start() < start:
            continue  # inside of a call's own JSON
        try:
            value, end = _json_at(text, tag.end())
            call = ToolCall(tag[1], _object(value, tag[1]), "tag")
            close = re.compile(r"\s*</function>").match(text, end)
            if not close:
                raise NoCall(f"the call of {tag[1]} lacks </function>")
        except NoCall as error:
            fault = fault or str(error)
            continue
        before = text[start : tag.start()]
        outside.append(before.removesuffix("\n") if before.strip() else "")
        calls.append(call)
        start = close.end()
    if not calls:
        return text, (), fault or "<function= without a name and >"
    rest = text[start:]
    return "".join([*outside, rest if rest.strip() else ""]), tuple(calls), fault


def _number(text: str) -> float:
    """A number of JSON, which has no NaN and nothing infinite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


CALLS_JSON = json.JSONDecoder(parse_float=_number, parse_constant=_number)


def _json_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return CALLS_JSON.raw_decode(text, _skip(text, at, " \t\r\n"))
    except JSON_ERRORS as error:
        raise NoCall(f"a call's JSON cannot be read: {error}") from None


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """Arguments as an object; some models write them as JSON text."""
    if isinstance(value, str):
        try:
            value = CALLS_JSON.decode(value)
        except JSON_ERRORS:
            value = None
    if not isinstance(value, Mapping):
        raise NoCall(f"the arguments of {name} are no JSON object")
    return value


def _json_calls(text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """Calls of JSON objects, or of a list of them, apart by ";", "," or blanks."""
    calls: list[ToolCall] = []
    at = 0
    while (at := _skip(text, at, " \t\r\n;,")) < len(text):
        value, at = _json_at(text, at)
        calls += (_json_call(one, names) for one in (value if isinstance(value, list) else [value]))
    if not calls:
        raise NoCall("an empty list holds no call")
    return tuple(calls)


def _json_call(value: Any, names: frozenset[str]) -> ToolCall:
    if not isinstance(value, Mapping):
        raise NoCall("a call is a JSON object, and here is another value")
    typed = value.get("type") == "function"
    if value.get("type") not in (None, "function") or value.keys() - _KEYS:
        raise NoCall("the JSON object has keys that no call has")
    if isinstance(inner := value.get("function"), Mapping):
        return _json_call({"type": "function", **inner}, names)
    name = value.get("name", inner)
    if not isinstance(name, str) or not name or (inner is not None and "name" in value):
        raise NoCall("the JSON object has no name of a function")
    given = [value[key] for key in ("parameters", "arguments") if key in value]
    if len(given) > 1:
        raise NoCall(f"the call of {name} has both parameters and arguments")
    if not given and not typed and name not in names:
        raise NoCall(f"the JSON object has the name {name!r} and no parameters")
    arguments = given[0] if given else {}
    return ToolCall(name, {} if arguments is None else _object(arguments, name), "json")


def _parsed(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.parse(text, mode="eval").body
    except _NO_PYTHON as error:
        raise NoCall(f"the calls are no Python: {error}") from None


def _python_calls(text: str, _: frozenset[str]) -> tuple[ToolCall, ...]:
    """Calls of a list in Python's syntax, told by its form. Nothing of it is executed."""
    text = text.rstrip()
    if not text.endswith("]"):
        raise NoCall("the list of calls has no end")
    tree = _parsed(text)
    if not isinstance(tree, ast.List):
        raise NoCall("the text is no list of calls")
    return tuple(ToolCall(*_python_call(item), "python_list") for item in tree.elts)


def _python_call(tree: ast.expr) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call whose values are literals."""
    if not isinstance(tree, ast.Call):
        raise NoCall("the list holds something else than calls")
    name, function = [], tree.func
    while isinstance(function, ast.Attribute):
        name.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        raise NoCall("a call's function is no name")
    called = ".".join([function.id, *reversed(name)])
    if tree.args or any(word.arg is None for word in tree.keywords):
        raise NoCall(f"the call of {called} has arguments without names")
    arguments = {}
    for word in tree.keywords:
        if word.arg in arguments:
            raise NoCall(f"the call of {called} gives {word.arg} twice")
        try:
            arguments[word.arg] = _value(word.value)
        except RecursionError:
            raise NoCall(f"an argument of {called} is nested too deeply") from None
        except ValueError as error:
            raise NoCall(f"an argument of {called}: {error}") from None
    return called, arguments


def _value(tree: ast.expr) -> Any:
    """The JSON value of a literal, in which true, false and null are JSON's."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str | int | float | None):
        return _number(repr(tree.value)) if isinstance(tree.value, float) else tree.value
    if isinstance(tree, ast.Name) and tree.id in _WORDS:
        return _WORDS[tree.id]
    if isinstance(tree, ast.List | ast.Tuple):
        return [_value(item) for item in tree.elts]
    if isinstance(tree, ast.Dict):
        keys = [None if key is None else _value(key) for key in tree.keys]
        if all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys):
            return dict(zip(keys, map(_value, tree.values), strict=True))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub | ast.UAdd):
        number = _value(tree.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(tree.op, ast.USub) else number
    raise NoCall(f"an argument is no literal: {ast.unparse(tree)[:40]}")


def _builtin_call(text: str) -> ToolCall:
    """The call NAME.call(…) of a built-in tool."""
    try:
        called, arguments = _python_call(_parsed(text))
    except NoCall:
        # Models, and the template on Hugging Face, leave quotes inside the text as they are.
        if not (raw := _RAW_ARGUMENT.fullmatch(text)):
            raise
        called, arguments = text.split("(")[0], {raw[1]: raw[2]}
    name = called.removesuffix(".call")
    if name == CODE and arguments.keys() == {"code"} and isinstance(arguments["code"], str):
        return ToolCall(CODE, arguments, "code")
    return ToolCall(name, arguments, "builtin")
