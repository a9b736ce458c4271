"""Calls in an answer that streams: their names and arguments come as they are made, and all else is
shown as soon as it cannot be a call."""

from __future__ import annotations

import json
import random

import pytest

from llama_fast.errors import PromptError
from llama_fast.serve.call_reader import CallReader, arguments_json
from llama_fast.tokenizer import ToolCall

TAG = 7  # the id of <|python_tag|>
NAMES = frozenset({"weather", "clock"})
CALL = '{"name": "weather", "parameters": {"town": "Oslo"}}'
OSLO = ("weather", {"town": "Oslo"})
CLOCK = ("clock", {})
ODD = '{"a": "}\\"{[", "b": [1, {"c": null}]}'


def read(parts, names=NAMES, single=False):
    """All that is shown before the end, the rest, and the calls. None is the tag."""
    reader = CallReader(names, TAG, single)
    shown, calls = "", []
    for part in parts:
        text, pieces = reader.push(TAG, "") if part is None else reader.push(0, part)
        shown += text
        for piece in pieces:
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[-1][1] += piece.arguments
    rest = reader.end()
    assert not reader.open, "a call is not whole"
    return shown, rest, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [OSLO]),
        (f"  \n{CALL}", "", [OSLO]),
        (f"Let me see.\n{CALL}", "Let me see.", [OSLO]),
        (f"{CALL}; {CALL}", "", [OSLO, OSLO]),
        (f"{CALL}\n{CALL}\n", "", [OSLO, OSLO]),
        (f"{CALL} So be it.", "So be it.", [OSLO]),
        (f"{CALL}\n\n{{x}}", "\n\n{x}", [OSLO]),
        ('{"type": "function", "name": "clock", "parameters": {}}', "", [CLOCK]),
        ('{"name": "weather", "arguments": ' + ODD + ', "id": "5"}', "",
         [("weather", json.loads(ODD))]),
        ('{"function": {"name": "weather", "arguments": "{\\"town\\": \\"Oslo\\"}"}}', "", [OSLO]),
        ('{"name": "clock"}', "", [CLOCK]),
        (f"[{CALL}, {CALL}]", "", [OSLO, OSLO]),
        ('<function=weather>{"town": "Oslo"}</function>', "", [OSLO]),
        ('<function=weather>{"town": "Oslo"}</function>\n<function=clock>{}</function>', "",
         [OSLO, CLOCK]),
        ('I look. <function=weather>{"town": "Oslo"}</function> So.', "I look.So.", [OSLO]),
        ('<function=weather>{"town": "Oslo"}', "", [OSLO]),
        ("[weather(town='Oslo'), clock()]", "", [OSLO, CLOCK]),
        ("[weather(town='it\\'s ]')]", "", [("weather", {"town": "it's ]"})]),
        ("It rains.", "It rains.", []),
        ("It rains.\n\n- a {b}\n- c [d]\n", "It rains.\n\n- a {b}\n- c [d]\n", []),
        ("a < b and <functional> and <function", "a < b and <functional> and <function", []),
        ("<function=rm>{}</function>", "<function=rm>{}</function>", []),
        ("<function=weather> is a tool", "<function=weather> is a tool", []),
        ("[1] a footnote\n\n [2] more", "[1] a footnote\n\n [2] more", []),
        ('{"answer": 5}', '{"answer": 5}', []),
        ("{no JSON} at all", "{no JSON} at all", []),
        (CALL[:30], CALL[:30], []),
        ("[weather(town=1e999)]", "[weather(town=1e999)]", []),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
        ("", "", []),
    ],
)  # fmt: skip
def test_in_whatever_parts_it_comes(text, content, calls):
    for size in (1, 2, 3, 7, len(text) or 1):
        shown, rest, found = read([text[n : n + size] for n in range(0, len(text), size)])
        assert shown + rest == content and found == calls


def test_random_texts():
    """Whatever a model writes: nothing raises, the parts do not matter, and what has no call in it
    is shown letter by letter."""
    parts = [*"{}[]()\"'\\,=> \n", "; ", "<function=", "weather", "</function>", "clock", "text",
             CALL, '{"name": "weather", "parameters": ', '{"town": "Oslo"}', '{"name": "clock"}',
             "[weather(town='x')]", "<func"]  # fmt: skip
    generator, called = random.Random(0), 0
    for _ in range(2000):
        text = "".join(generator.choices(parts, k=generator.randrange(1, 9)))
        found = []
        for size in (1, 3, len(text)):
            reader, shown, pieces = CallReader(NAMES, TAG), "", []
            for start in range(0, len(text), size):
                more, new = reader.push(0, text[start : start + size])
                shown, pieces = shown + more, pieces + new
            names = [piece.name for piece in pieces if piece.name]
            arguments = "".join(piece.arguments for piece in pieces)
            found.append((shown + reader.end(), names, arguments, reader.open))
        assert found[0] == found[1] == found[2] and reader.text == text
        assert names or found[0][0] == text
        called += bool(names)
    assert called > 200


def test_a_call_comes_in_pieces():
    reader = CallReader(NAMES, TAG)
    for part in ('{"na', 'me": "weather"', ', "parameters": '):
        assert reader.push(0, part) == ("", [])
    assert reader.push(0, "{") == ("", [("weather", ""), (None, "{")])
    assert reader.push(0, '"town": "O') == ("", [(None, '"town": "O')]) and reader.open
    assert reader.push(0, 'slo"}') == ("", [(None, 'slo"}')]) and reader.open
    assert reader.push(0, "}") == ("", []) and not reader.open
    assert reader.push(0, "; <function=clock>{") == ("", [("clock", ""), (None, "{")])
    assert reader.end() == "" and reader.open  # cut off
    assert reader.text == CALL + "; <function=clock>{"


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL}; {CALL}",
        '<function=weather>{"town": "Oslo"}</function><function=clock>{}</function>',
        "[weather(town='Oslo'), clock()] and",
        '{"function": {"name": "weather", "arguments": {"town": "Oslo"}}}\nwas it',
    ],
)
def test_a_single_call(text):
    assert read(text, single=True) == ("", "", [OSLO])
    reader, pushed = CallReader(NAMES, TAG, single=True), 0
    while not reader.ends(0, text[pushed]):
        pushed += 1
    assert pushed < len(text) - 3


def test_plain_text_does_not_wait():
    reader = CallReader(NAMES, TAG)

    def shown(text):
        found, pieces = reader.push(0, text)
        assert not pieces
        return found

    assert shown("It") == "It"
    assert shown(" rains") == " rains"
    assert shown(" {here}, [there]") == " {here}, [there]"
    assert shown("\n") == ""  # a call may begin
    assert shown("and") == "\nand"
    assert shown(" <fun") == ""
    assert shown("ny>") == " <funny>"
    assert shown("\n[") == ""
    assert shown("1] note") == "\n[1] note"
    assert reader.end() == ""


def test_after_the_tag():
    assert read(["I look it up.", None, CALL]) == ("I look it up.", "", [OSLO])
    assert read([None, CALL, "\n"]) == ("", "", [OSLO])
    # Code for an interpreter that was not offered is text.
    assert read(["So: ", None, "print(5)"]) == ("So: print(5)", "", [])


def test_blanks_and_brackets_without_end_take_no_time():
    parts = [" \n"] * 3000 + ["x"] + ["\n["] + ["\n"] * 3000
    shown, rest, calls = read(parts)
    assert shown + rest == "".join(parts) and not calls
    parts = ["{"] * 3000 + ["\n<function="] * 1000 + ["[}"] * 1000
    shown, rest, calls = read(parts)
    assert shown + rest == "".join(parts) and not calls


def test_arguments_as_json():
    assert json.loads(arguments_json(ToolCall(*OSLO))) == {"town": "Oslo"}
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PromptError, match="deeply"):
        arguments_json(ToolCall("clock", {"a": deep}))
