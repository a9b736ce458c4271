"""Calls in an answer that streams: what may be a call waits, and all else is shown at once."""

from __future__ import annotations

import json

import pytest

from llama_fast.errors import PromptError
from llama_fast.serve.tools import CallReader, as_openai
from llama_fast.tokenizer import ToolCall

TAG = 7  # the id of <|python_tag|>
NAMES = frozenset({"weather", "clock"})
CALL = '{"name": "weather", "parameters": {"town": "Oslo"}}'
OSLO = ToolCall("weather", {"town": "Oslo"})


def read(parts, names=NAMES):
    """All that is shown before the end, the rest, and the calls. None is the tag."""
    reader = CallReader(names, TAG)
    shown = "".join(reader.push(TAG, "") if x is None else reader.push(0, x) for x in parts)
    return shown, *reader.end()


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [OSLO]),
        (f"  \n{CALL}", "", [OSLO]),
        (f"Let me see.\n{CALL}", "Let me see.", [OSLO]),
        (f"{CALL}; {CALL}", "", [OSLO, OSLO]),
        ('<function=weather>{"town": "Oslo"}</function>', "", [OSLO]),
        ('I look. <function=weather>{"town": "Oslo"}</function>', "I look. ", [OSLO]),
        ("[weather(town='Oslo'), clock()]", "", [OSLO, ToolCall("clock")]),
        ("It rains.", "It rains.", []),
        ("It rains.\n\n- a {b}\n- c [d]\n", "It rains.\n\n- a {b}\n- c [d]\n", []),
        ("a < b and <functional> and <function", "a < b and <functional> and <function", []),
        ("[1] a footnote", "[1] a footnote", []),
        ('{"answer": 5}', '{"answer": 5}', []),
        (CALL[:30], CALL[:30], []),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
        ("", "", []),
    ],
)
def test_in_whatever_parts_it_comes(text, content, calls):
    for size in (1, 2, 3, 7, len(text) or 1):
        shown, rest, found = read([text[n : n + size] for n in range(0, len(text), size)])
        assert shown + rest == content and found == calls


def test_plain_text_does_not_wait():
    reader = CallReader(NAMES, TAG)
    assert reader.push(0, "It") == "It"
    assert reader.push(0, " rains") == " rains"
    assert reader.push(0, " {here}, [there]") == " {here}, [there]"
    assert reader.push(0, "\n") == ""  # a call may begin
    assert reader.push(0, "and") == "\nand"
    assert reader.push(0, " <fun") == ""
    assert reader.push(0, "ny>") == " <funny>"
    assert reader.push(0, "\n[") == ""
    assert reader.push(0, "1] note") == ""
    assert reader.end() == ("\n[1] note", [])


def test_after_the_tag():
    assert read(["I look it up.", None, CALL]) == ("I look it up.", "", [OSLO])
    assert read([None, CALL, "\n"]) == ("", "", [OSLO])
    # Code for an interpreter that was not offered is text.
    assert read(["So: ", None, "print(5)"]) == ("So:", " print(5)", [])


def test_blanks_without_end_take_no_time():
    parts = [" \n"] * 3000 + ["x"] + ["\n["] + ["\n"] * 3000
    shown, rest, calls = read(parts)
    assert shown + rest == "".join(parts) and not calls


def test_a_call_as_openai_has_it():
    first, second = as_openai(OSLO), as_openai(OSLO)
    assert first["id"] != second["id"] and first["type"] == "function"
    assert json.loads(first["function"]["arguments"]) == {"town": "Oslo"}
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PromptError, match="deeply"):
        as_openai(ToolCall("clock", {"a": deep}))
