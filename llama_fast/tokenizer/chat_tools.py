"""What a model is told of the tools it may call: name, description, parameters as JSON schema."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from .chat_messages import BUILTIN_TOOLS

_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_UNIONS = (typing.Union, types.UnionType)


@dataclass(frozen=True)
class ToolDefinition:
    """A tool's name, what it does, and its parameters as a JSON schema of type "object".

    Raises PromptError for a name that is no text and for parameters that are no object.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PromptError(f"the name of a tool is {self.name!r}; give a text")
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise PromptError(
                f"the parameters of tool {self.name} are {type(self.parameters).__name__}; "
                "give a JSON schema as a dict"
            )

    def function(self) -> dict[str, Any]:
        """Returns {"name", "description"?, "parameters"?}."""
        given = {"description": self.description, "parameters": self.parameters}
        return {"name": self.name} | {k: v for k, v in given.items() if v is not None}

    def as_dict(self) -> dict[str, Any]:
        """Returns {"type": "function", "function": …}, as chat templates take it."""
        return {"type": "function", "function": self.function()}

    @classmethod
    def from_dict(cls, tool: Mapping[str, Any]) -> ToolDefinition:
        """Returns the tool of {"type": "function", "function": {"name", …}}, or of the inner
        object alone. Raises PromptError for another object."""
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise PromptError(
                f"a tool is {tool!r}; give an object with name, description and parameters"
            )
        return cls(function["name"], function.get("description"), function.get("parameters"))

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> ToolDefinition:
        """Returns the tool that a Python function is.

        Its signature gives the types (str, int, float, bool, None, list[…], dict[…], Literal, and
        unions of these) and which parameters are required; its docstring's first paragraph is the
        description, and its "Args:" section describes the parameters, one `name: text` each. Raises
        PromptError for a parameter without a type, and for *args and positional-only ones.
        """
        name = getattr(function, "__name__", repr(function))
        try:
            hints = typing.get_type_hints(function)
            signature = inspect.signature(function)
        except (TypeError, ValueError, NameError) as error:
            raise PromptError(
                f"the signature of {name} cannot be read ({error}); give a ToolDefinition"
            ) from None
        description, texts = _docstring(inspect.getdoc(function) or "")
        properties, required = {}, []
        for parameter in signature.parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise PromptError(
                    f"parameter {parameter} of {name} cannot be given by name; tools are called "
                    "with named arguments only"
                )
            if parameter.name not in hints:
                raise PromptError(
                    f"parameter {parameter.name} of {name} has no type; write one, such as "
                    f"`{parameter.name}: str`"
                )
            schema = _schema(hints[parameter.name], f"parameter {parameter.name} of {name}")
            if parameter.name in texts:
                schema["description"] = texts[parameter.name]
            properties[parameter.name] = schema
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if required:
            parameters["required"] = required
        return cls(name, description or None, parameters)


def _schema(hint: Any, of_what: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Annotated:
        return _schema(arguments[0], of_what)
    if origin is typing.Literal:
        kinds = {type(value) for value in arguments}
        if len(kinds) > 1 or not kinds <= _TYPES.keys():
            raise PromptError(f"{of_what} lists values of several types; use one")
        return {"type": _TYPES[kinds.pop()], "enum": list(arguments)}
    if origin in _UNIONS:
        others = [part for part in arguments if part is not type(None)]
        found = [_schema(part, of_what) for part in others]
        if len(found) == 1:
            schema = found[0]
        elif all(part.keys() == {"type"} for part in found):
            schema = {"type": sorted(part["type"] for part in found)}
        else:
            schema = {"anyOf": found}
        return schema | ({"nullable": True} if len(others) < len(arguments) else {})
    kind = _TYPES.get(origin or hint)
    if kind is None:
        raise PromptError(
            f"{of_what} is of type {hint!r}, which JSON has not; use str, int, float, bool, list, "
            "dict, Literal or a union of these"
        )
    if kind == "array" and arguments:
        inner = [part for part in arguments if part is not ...]
        if len(set(inner)) == 1:
            return {"type": kind, "items": _schema(inner[0], of_what)}
    if kind == "object" and len(arguments) == 2 and arguments[1] is not Any:
        return {"type": kind, "additionalProperties": _schema(arguments[1], of_what)}
    return {"type": kind}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Returns the description of a function, and of each parameter in its "Args:" section."""
    head = re.search(r"^\s*(?:Args|Arguments|Parameters):\s*$", text, re.MULTILINE)
    before, rest = (text[: head.start()], text[head.end() :]) if head else (text, "")
    description = re.split(r"\n\s*\n|(?:^|\n)(?:Returns|Raises|Yields):", before.strip())[0]
    found: dict[str, str] = {}
    name = None
    for line in rest.splitlines():
        if re.match(r"(?:Returns|Raises|Yields|Examples?):", line):
            break
        if head := re.match(r"\s+(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)", line):
            name = head[1]
            found[name] = head[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return " ".join(description.split()), found


def as_tools(tools: Iterable[Any] | None) -> tuple[list[str], list[ToolDefinition]]:
    """Returns the built-in tools (by name) and the others of a list that may hold names, functions,
    dicts and ToolDefinitions. Raises PromptError for anything else, and for two of one name."""
    builtin: list[str] = []
    custom: list[ToolDefinition] = []
    if isinstance(tools, str | Mapping | ToolDefinition) or callable(tools):
        raise PromptError("tools is one tool; give a list of them")
    for tool in tools or ():
        if isinstance(tool, str):
            if tool not in BUILTIN_TOOLS:
                raise PromptError(
                    f"tools has {tool!r}; by name alone the model knows "
                    f"{', '.join(BUILTIN_TOOLS)}: give a ToolDefinition or a function"
                )
            builtin.append(tool)
        elif isinstance(tool, ToolDefinition):
            custom.append(tool)
        elif isinstance(tool, Mapping):
            custom.append(ToolDefinition.from_dict(tool))
        elif callable(tool):
            custom.append(ToolDefinition.from_function(tool))
        else:
            raise PromptError(
                f"tools holds {tool!r}; give a ToolDefinition, a function, a dict or a name"
            )
    names = builtin + [tool.name for tool in custom]
    if len(set(names)) < len(names):
        raise PromptError(f"two tools have one name: {', '.join(sorted(names))}")
    return builtin, custom
