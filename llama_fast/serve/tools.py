"""Tools of a request, and the calls of them in an answer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from ..errors import PromptError, RequestError
from ..tokenizer import ToolCall, ToolDefinition
from ..tokenizer.chat_messages import BUILTIN_TOOLS
from ..tokenizer.chat_parse import read_calls
from .fields import Fields

MOST_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Where the text of a call may begin: with one of these at the begin of a line, or with this tag.
_TAG = "<function="
_BEGINS = re.compile(r"[\[{]|" + _TAG)


def tools_of(fields: Fields) -> list[ToolDefinition]:
    """Returns the functions of `tools`. Raises RequestError for anything else."""
    found: list[ToolDefinition] = []
    given = fields.list("tools", [])
    if len(given) > MOST_TOOLS:
        fields.refuse("tools", f"has {len(given)} entries; give at most {MOST_TOOLS}")
    for n, one in enumerate(given):
        tool = Fields(one, f"tools[{n}]")
        if tool.text("type", "function") != "function":
            tool.refuse("type", "must be function; others are not served", "unsupported_value")
        function = tool.object("function")
        if function is None:
            tool.refuse("function", "is missing; give an object with name and parameters")
        tool.end()
        name = function.text("name", "")
        if not _NAME.fullmatch(name) or name in BUILTIN_TOOLS:
            function.refuse(
                "name",
                "must be 1 to 64 of the characters a-z, A-Z, 0-9, _, . and -, and none of "
                f"{', '.join(BUILTIN_TOOLS)}",
            )
        if any(other.name == name for other in found):
            function.refuse("name", f"is {name!r}, as another tool's is; give each its own")
        description = function.text("description")
        parameters = function.any("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            function.refuse("parameters", "must be a JSON schema, an object")
        function.ignore(("strict",))
        function.end()
        found.append(ToolDefinition(name, description, parameters))
    return found


def choice_of_tools(
    fields: Fields, tools: list[ToolDefinition]
) -> tuple[str, list[ToolDefinition]]:
    """Returns "none", "auto" or "required" of `tool_choice`, and the tools that may be called. A
    function by name is required, and alone."""
    choice = fields.any("tool_choice", "auto" if tools else "none")
    if isinstance(choice, dict):
        given = Fields(choice, "tool_choice")
        if given.text("type") != "function":
            given.refuse("type", "must be function", "unsupported_value")
        function = given.object("function")
        name = function.text("name") if function is not None else None
        named = [tool for tool in tools if tool.name == name]
        if not named:
            given.refuse("function", "names no function of tools")
        return "required", named
    if choice not in ("none", "auto", "required"):
        fields.refuse("tool_choice", "must be none, auto, required or an object with a function")
    if choice == "required" and not tools:
        fields.refuse("tool_choice", "is required, and there are no tools")
    return (choice, tools) if choice != "none" and tools else ("none", [])


def called(tools: Sequence[ToolDefinition]) -> dict[str, Any]:
    """Returns the JSON schema of a call of one of these tools."""
    for tool in tools:
        if tool.parameters and ("$defs" in tool.parameters or "definitions" in tool.parameters):
            raise RequestError(
                f"the parameters of {tool.name} have definitions of their own, which a tool that "
                "must be called cannot have here; write them out",
                param="tools",
                code="unsupported_value",
            )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "parameters": tool.parameters or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class CallReader:
    """Tells calls from text while an answer is made.

    names: the tools that may be called; anything else that looks like a call is text. python_tag:
    the id of <|python_tag|>, after which a call follows.

    What may be a call waits: from the begin of a line with "{" or "[", from "<function=", or from
    the tag on, all that follows is text or calls only when the answer is whole.
    """

    def __init__(self, names: frozenset[str], python_tag: int | None) -> None:
        self._names, self._tag = names, python_tag
        self._text = ""
        self._code: str | None = None
        self._shown = 0
        self._waits = False  # until the answer is whole

    def push(self, token: int, text: str) -> str:
        """Takes a token and its text; returns what can be shown."""
        if self._code is not None:
            self._code += text
            return ""
        self._text += text
        if token == self._tag:
            self._code = ""
        return self._show(self._safe())

    def end(self) -> tuple[str, list[ToolCall]]:
        """Returns the rest of the text, and the calls, when the answer is whole."""
        content, calls, _ = read_calls(self._text, self._code, self._names)
        if calls and all(call.name in self._names for call in calls):
            return content[self._shown :], list(calls)
        self._text += self._code or ""
        return self._show(len(self._text)), []

    def _safe(self) -> int:
        """Where text ends that is no part of a call; blanks before a call may belong to it."""
        text = self._text
        for found in () if self._waits else _BEGINS.finditer(text, self._shown):
            at = found.start()
            line = text[text.rfind("\n", 0, at) + 1 : at]
            if found.group() == _TAG or not line.strip():
                self._waits = True
                return max(self._shown, len(text[:at].rstrip()))
        if self._waits:
            return self._shown
        begun = next((n for n in range(len(_TAG) - 1, 0, -1) if text.endswith(_TAG[:n])), 0)
        return max(self._shown, len(text[: len(text) - begun].rstrip()))

    def _show(self, end: int) -> str:
        text = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return text


def as_openai(call: ToolCall) -> dict[str, Any]:
    """Returns a call as OpenAI's answers hold it, with a new id."""
    try:
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    except RecursionError:
        raise PromptError("the arguments of a call are nested too deeply") from None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
