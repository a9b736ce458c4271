"""Tools of a request, and which of them are to be called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from ..tokenizer import ToolDefinition
from ..tokenizer.chat_messages import BUILTIN_TOOLS
from .fields import Fields

MOST_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


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
