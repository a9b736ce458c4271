"""Tools as the model is told of them, from functions and from JSON; the order of a dialog."""

from __future__ import annotations

from typing import Any, Literal, Optional, Union

import pytest

from llama_fast.errors import PromptError
from llama_fast.tokenizer import Message, ToolCall, ToolDefinition
from llama_fast.tokenizer.chat_messages import order_fault


def forecast(
    city: str,
    days: int = 3,
    scale: Literal["celsius", "kelvin"] = "celsius",
    places: list[float] | None = None,
    extra: dict[str, int] = {},  # noqa: B006
    detailed: bool = False,
):
    """Tells the weather to come.

    It looks at several sources.

    Args:
        city: the city, with
            its country
        days: how many days
        scale: the scale
        places: longitude and latitude
        extra: what else
        detailed: whether to say more

    Returns:
        A text: the forecast.
    """


def test_a_function_is_a_tool():
    tool = ToolDefinition.from_function(forecast)
    assert tool.description == "Tells the weather to come."
    schema = tool.parameters["properties"]
    assert tool.parameters["required"] == ["city"]
    assert schema["city"] == {"type": "string", "description": "the city, with its country"}
    assert schema["scale"]["enum"] == ["celsius", "kelvin"]
    assert schema["places"]["nullable"] and schema["places"]["items"] == {"type": "number"}
    assert schema["extra"]["additionalProperties"] == {"type": "integer"}
    assert ToolDefinition.from_dict(tool.as_dict()) == tool
    assert ToolDefinition.from_dict(tool.function()) == tool


def test_a_functions_parameters_are_those_of_transformers():
    from transformers.utils import get_json_schema

    wanted = get_json_schema(forecast)["function"]["parameters"]
    found = ToolDefinition.from_function(forecast).parameters
    for name, schema in wanted["properties"].items():
        schema["description"] = " ".join(schema["description"].split())
        assert found["properties"][name] == schema, name
    assert found["required"] == wanted["required"]


def test_other_signatures():
    def any_of(a: Any, b: Optional[int], c: Union[int, str], d: list, *, e: tuple[int, ...]): ...  # noqa: UP007, UP045

    any_of.__doc__ = """
    Args:
        d (list): some,
          of them
    """
    found = ToolDefinition.from_function(any_of)
    assert found.description is None
    assert found.parameters["properties"] == {
        "a": {},
        "b": {"type": "integer", "nullable": True},
        "c": {"type": ["integer", "string"]},
        "d": {"type": "array", "description": "some, of them"},
        "e": {"type": "array", "items": {"type": "integer"}},
    }

    def untyped(a): ...
    def many(*a: int): ...
    def strange(a: set[int]): ...
    def mixed(a: Literal[1, "x"]): ...

    for function, problem in (
        (untyped, "parameter a of untyped has no type; write one"),
        (many, "cannot be given by name"),
        (strange, "which JSON has not"),
        (mixed, "values of several types"),
        (print, "cannot be given by name"),
    ):
        with pytest.raises(PromptError, match=problem):
            ToolDefinition.from_function(function)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ToolCall("", {}), "name of a tool call"),
        (lambda: ToolCall("f", [1]), "arguments of a call of f are"),
        (lambda: ToolCall("f", {1: 2}), "arguments of a call of f are"),
        (lambda: ToolCall("f", {}, "xml"), "kind='xml'"),
        (lambda: ToolCall.from_dict({"function": "f"}), "give an object with name"),
        (lambda: ToolCall.from_dict({"name": "f", "arguments": "{"}), "are no JSON"),
        (lambda: Message("user", "x", (ToolCall("f"),)), "only the assistant calls tools"),
        (lambda: Message("assistant", "x", ({"name": "f"},)), "something else than ToolCall"),
        (lambda: Message("user", {"a": 1}), "content of a message of role user is dict"),
        (lambda: Message.from_dict({"role": 3}), "role=3"),
        (lambda: Message([]), r"role=\[\]"),
        (lambda: ToolDefinition("f", "", [1]), "give a JSON schema"),
        (lambda: ToolDefinition(3), "name of a tool is 3"),
    ],
)
def test_what_is_no_message_call_or_tool(make, problem):
    with pytest.raises(PromptError, match=problem):
        make()


def test_messages_as_others_write_them():
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert Message.from_dict(parts) == Message("user", "ab")
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    found = Message.from_dict({"role": "assistant", "content": None, "tool_calls": calls})
    assert found == Message("assistant", "", (ToolCall("f", {"a": 1}),))
    assert found.as_dict()["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found.tool_calls[0].id == "c1"
    result = Message.from_dict({"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"})
    assert result.role == "ipython"
    assert result.as_dict() == {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"}


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        ("u a u a", None),
        ("s u a", None),
        ("s u", None),
        ("u c t a", None),
        ("u c t t c t a u a", None),
        ("u s", "message 2 is a system message"),
        ("s s u", "message 2 is a system message"),
        ("a", "message 1 is the assistant's, before any user"),
        ("s a", "message 2 is the assistant's, before any user"),
        ("u u a", "messages 1 and 2 are both the user's"),
        ("u a a", "messages 2 and 3 are both the assistant's"),
        ("u t", "message 2 is a tool's result, and no call"),
        ("u a t", "message 3 is a tool's result, and no call"),
        ("u c u", "message 3 is the user's, where the result"),
        ("u c t a t", "message 5 is a tool's result"),
    ],
)  # fmt: skip
def test_the_order_of_a_dialog(roles, fault):
    kinds = {
        "s": Message("system", "s"),
        "u": Message("user", "u"),
        "a": Message("assistant", "a"),
        "c": Message("assistant", "", (ToolCall("f"),)),
        "t": Message("tool", "t"),
    }
    found = order_fault([kinds[role] for role in roles.split()])
    assert found is None if fault is None else found.startswith(fault)
