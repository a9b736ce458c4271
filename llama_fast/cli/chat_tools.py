"""Tools of a chat: functions of a file that the user names, run when the model calls them."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlamaFastError
from ..tokenizer import Message, ToolCall, ToolDefinition

# What is asked before a call runs → whether it may.
Ask = Callable[[str], bool]


class Tools:
    """Functions by name, and how their results go back to the model."""

    def __init__(self, functions: Sequence[Callable[..., Any]] = ()) -> None:
        self.functions = {function.__name__: function for function in functions}
        self.definitions = [ToolDefinition.from_function(function) for function in functions]

    @classmethod
    def from_file(cls, path: Path) -> Tools:
        """Returns the functions that a Python file defines, without those that begin with "_". The
        file is run. Raises LlamaFastError where that fails or it defines none."""
        if not path.is_file():
            raise LlamaFastError(f"--tools: {path} is no file; give a Python file with functions")
        spec = importlib.util.spec_from_file_location("tools_of_the_chat", path)
        if spec is None:
            raise LlamaFastError(f"--tools: {path} is no Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise LlamaFastError(
                f"--tools: {path} cannot be run: {type(error).__name__}: {error}"
            ) from error
        found = [
            value
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        ]
        if not found:
            raise LlamaFastError(
                f"--tools: {path} defines no functions; write one with types and a docstring"
            )
        return cls(found)

    def run(self, call: ToolCall, ask: Ask) -> Message:
        """Returns the result of a call as a message; a refusal or an error is a result too."""
        return Message("ipython", self._result(call, ask), name=call.name, tool_call_id=call.id)

    def _result(self, call: ToolCall, ask: Ask) -> str:
        function = self.functions.get(call.name)
        if function is None:
            there = ", ".join(self.functions) or "none"
            return _error(f"there is no tool {call.name}; there are: {there}")
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return _error(f"{call.name}: {error}")
        if not ask(shown(call)):
            return _error("the user did not allow this call")
        try:
            return as_text(function(**call.arguments))
        except KeyboardInterrupt:
            return _error("the user stopped this call")
        except (Exception, SystemExit) as error:
            return _error(f"{type(error).__name__}: {error}")


def shown(call: ToolCall) -> str:
    """Returns a call as Python would have it."""
    if set(call.arguments) == {"code"} and call.kind == "code":
        return call.arguments["code"]
    return f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})"


def as_text(result: Any) -> str:
    """Returns what the model reads of a function's result: a text as it is, else JSON, and what is
    no JSON as Python writes it."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(dict(result) if isinstance(result, Mapping) else result,
                          ensure_ascii=False)  # fmt: skip
    except (TypeError, ValueError):
        return repr(result)


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)
