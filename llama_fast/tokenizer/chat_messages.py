"""The parts of a dialog: messages and the calls of tools in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import JSON_ERRORS, PromptError

ROLES = ("system", "user", "assistant", "ipython")
# What others call the result of a tool.
OTHER_NAMES = {"tool": "ipython"}
# Tools that Llama 3.1 knows by name; their calls follow <|python_tag|>.
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "code_interpreter")
CODE = "code_interpreter"
# How a call is written: {"name": …}, <function=NAME>{…}</function>, [name(…)], NAME.call(…), code.
KINDS = ("json", "tag", "python_list", "builtin", "code")


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool by the assistant.

    name: the tool's. arguments: name to a JSON value; code for the interpreter is {"code": text}.
    kind: how it is written ("json", "tag", "python_list", "builtin", "code"); None is the way of
    the format that encodes it. id: what others give a call, for templates that ask for it. Calls
    of one name with equal arguments are equal. Raises PromptError for anything else.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kind: str | None = field(default=None, compare=False)
    id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PromptError(f"the name of a tool call is {self.name!r}; give a text")
        if not isinstance(self.arguments, Mapping) or not all(
            isinstance(key, str) for key in self.arguments
        ):
            raise PromptError(
                f"the arguments of a call of {self.name} are {self.arguments!r}; "
                "give a dict from names to values"
            )
        if self.kind not in (None, *KINDS):
            raise PromptError(
                f"a call of {self.name} has kind={self.kind!r}; give one of {', '.join(KINDS)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Returns the call as OpenAI's messages have it, its arguments as an object."""
        function = {"name": self.name, "arguments": dict(self.arguments)}
        with_id = {} if self.id is None else {"id": self.id}
        return {**with_id, "type": "function", "function": function}

    @classmethod
    def from_dict(cls, call: Mapping[str, Any]) -> ToolCall:
        """Returns the call of an entry of `tool_calls`, or of {"name", "arguments"}; arguments may
        be JSON text. Raises PromptError for another object."""
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise PromptError(f"a tool call is {call!r}; give an object with name and arguments")
        arguments = function.get("arguments", function.get("parameters"))
        return cls(function["name"], arguments_of(arguments), id=call.get("id"))


def arguments_of(value: Any) -> Any:
    """Returns a call's arguments, which may be JSON text or missing. Raises PromptError for text
    that is no JSON."""
    if value is None or value == "":
        return {}
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except JSON_ERRORS as error:
        raise PromptError(f"the arguments {value[:60]!r} are no JSON ({error})") from None


@dataclass(frozen=True)
class Message:
    """One message of a dialog.

    role: "system", "user", "assistant", or "ipython" (a tool's result; "tool" is the same).
    content: the text; the result of a tool may be an object or a list, which is written as JSON.
    tool_calls: the assistant's calls. name, tool_call_id: what others give a result, for templates
    that ask for it. Of a decoded message: end is the token that ended it ("eot", "eom", "eos", or
    None where it was cut off), fault says why what looks like a call is left as text.
    Raises PromptError for anything else.
    """

    role: str
    content: Any = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = field(default=None, compare=False)
    tool_call_id: str | None = field(default=None, compare=False)
    end: str | None = field(default=None, compare=False)
    fault: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.role, str):
            object.__setattr__(self, "role", OTHER_NAMES.get(self.role, self.role))
        if self.role not in ROLES:
            raise PromptError(
                f"a message has role={self.role!r}; give one of {', '.join(ROLES)} or tool"
            )
        if not isinstance(self.content, str) and not (
            self.role == "ipython" and isinstance(self.content, Mapping | list)
        ):
            raise PromptError(
                f"the content of a message of role {self.role} is "
                f"{type(self.content).__name__}; give a text"
            )
        calls = (self.tool_calls,) if isinstance(self.tool_calls, ToolCall) else self.tool_calls
        object.__setattr__(self, "tool_calls", tuple(calls or ()))
        if not all(isinstance(call, ToolCall) for call in self.tool_calls):
            raise PromptError("tool_calls holds something else than ToolCall")
        if self.tool_calls and self.role != "assistant":
            raise PromptError(
                f"a message of role {self.role} has tool calls; only the assistant calls tools"
            )

    def as_dict(self) -> dict[str, Any]:
        """Returns the message as chat templates take it; a tool's result has the role "tool"."""
        role = "tool" if self.role == "ipython" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in extra.items() if value is not None}

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Message:
        """Returns the message of {"role", "content", "tool_calls"?}, as OpenAI and transformers
        write it. Content may be null beside calls, or a list of parts {"type": "text", "text"}.
        Raises PromptError for what is no such message, images included."""
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"a message is {message!r}; give an object with role and content")
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise PromptError(f"tool_calls is {type(calls).__name__}; give a list")
        role = message["role"]
        if not isinstance(role, str):
            raise PromptError(f"a message has role={role!r}; give one of {', '.join(ROLES)}")
        content = text_of(message.get("content"), role)
        return cls(
            role,
            content,
            tuple(map(ToolCall.from_dict, calls)),
            name=message.get("name"),
            tool_call_id=message.get("tool_call_id"),
        )


def text_of(content: Any, role: str) -> Any:
    """Returns the text of a message's content, whose text parts are joined. Raises PromptError for
    a part that is no text."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else None
    if parts is None or not all(isinstance(p, Mapping) and "type" in p for p in parts):
        return content
    texts = []
    for part in parts:
        if part["type"] not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            raise PromptError(
                f"a message of role {role} has a part of type {part['type']!r}; "
                "these models read text parts only"
            )
        texts.append(part["text"])
    return "".join(texts)


def as_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
    """Returns a dialog's messages, which may be given as dicts. Raises PromptError for none."""
    if isinstance(messages, str | Mapping | Message):
        raise PromptError(f"messages is a {type(messages).__name__}; give a list of messages")
    found = [m if isinstance(m, Message) else Message.from_dict(m) for m in messages]
    if not found:
        raise PromptError("the dialog has no messages; give at least one")
    return found


def order_fault(messages: list[Message]) -> str | None:
    """Returns what is wrong in the order of a dialog's messages, None where nothing is: a late
    system message, an assistant first, two user turns running, a tool result without a call."""
    before: Message | None = None
    waiting = False  # for tool results
    for n, message in enumerate(messages, 1):
        role, last = message.role, before.role if before else None
        if role == "system" and n > 1:
            return f"message {n} is a system message; it must be the first"
        if role == "assistant" and last in (None, "system"):
            return f"message {n} is the assistant's, before any user message"
        if role == "assistant" and last == "assistant":
            return f"messages {n - 1} and {n} are both the assistant's"
        if role == "user" and last == "user":
            return f"messages {n - 1} and {n} are both the user's"
        if role == "ipython" and not waiting:
            return f"message {n} is a tool's result, and no call comes before it"
        if role == "user" and waiting and last == "assistant":
            return f"message {n} is the user's, where the result of a tool call is due"
        waiting = bool(message.tool_calls) or (waiting and role == "ipython")
        before = message
    return None
