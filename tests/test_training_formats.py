"""Formats of training data, told by their keys, and the faults of files and rows."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.errors import DataError, PromptError, TokenizerError
from llama_fast.tokenizer import ChatFormat, Message
from llama_fast.training import read
from llama_fast.training.formats import (
    Completion,
    Dialog,
    Document,
    Preference,
    parse_row,
    read_preferences,
)
from llama_fast.training.masks import example
from llama_fast.training.rows import raw_rows

from .test_chat import demo  # noqa: F401  a fixture
from .test_chat_decode import tokenizer_of_demo
from .training_rows import CALL, MIXED, TOOL, dialog, write

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
CALLS = Message("assistant", "", (CALL,))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"text": "a"}, Document("a")),
        ("a", Document("a")),
        ({"instruction": "i", "input": "x", "output": "o"}, Dialog((U("i\nx"), A("o")))),
        ({"instruction": "i", "input": "", "output": "o"}, Dialog((U("i"), A("o")))),
        ({"instruction": "", "input": "x", "output": "o"}, Dialog((U("x"), A("o")))),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"], ["r", "b"]]},
            Dialog((S("s"), U("q"), A("a"), U("r"), A("b"), U("i"), A("o"))),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            Dialog((S("s"), U("q"), A("a"))),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "r"},
                    {"from": "assistant", "value": "a"},
                ],
            },
            Dialog((S("s"), U("q"), CALLS, Message("tool", "r"), A("a"))),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
                    },
                    {"role": "tool", "content": "r"},
                    {"role": "assistant", "content": "a"},
                ],
                "mood": "ignored",
            },
            Dialog((U("q"), CALLS, Message("tool", "r"), A("a"))),
        ),
        ({"prompt": "p", "completion": "c"}, Completion("p", "c")),
        (
            {
                "prompt": [*dialog()["messages"], {"role": "user", "content": "x"}],
                "completion": [{"role": "assistant", "content": "y"}],
            },
            Dialog((U("Q?"), A("Yes."), U("x"), A("y")), first=3),
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            Preference(Completion("p", "c"), Completion("p", "r")),
        ),
        (
            {"instruction": "Q?", "input": "", "chosen": "Yes.", "rejected": "No."},
            Preference(Dialog((U("Q?"), A("Yes."))), Dialog((U("Q?"), A("No.")))),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Q?"}],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            Preference(Dialog((U("Q?"), A("Yes."))), Dialog((U("Q?"), A("No.")))),
        ),
        (
            {"chosen": dialog()["messages"], "rejected": dialog(answer="No.")["messages"]},
            Preference(Dialog((U("Q?"), A("Yes."))), Dialog((U("Q?"), A("No.")))),
        ),
    ],
)  # fmt: skip
def test_formats_are_told_by_their_keys(value, wanted):
    assert parse_row(value) == wanted


def test_tools_of_a_row():
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        found = parse_row(dialog() | {"tools": tools}).tools
        assert [tool.name for tool in found] == ["f"]
    assert parse_row(dialog() | {"tools": ["brave_search"]}).tools == ("brave_search",)
    assert parse_row(dialog() | {"tools": ""}).tools == ()


def roles(*names):
    return {"messages": [{"role": name, "content": "x"} for name in names]}


FAULTS = [
    (3, "a row is a number; an object"),
    ({"txt": "a"}, "keys txt are of no known format; known are text"),
    ({}, "keys of the row, none, are of no known"),
    ({"text": 1}, "text is a number; a text is needed"),
    ({"text": "  "}, "text is empty"),
    ({"messages": "x"}, "messages is a text; a list"),
    ({"messages": []}, "messages is a list; a list of messages is needed"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role='robot'"),
    (roles("user", "system", "assistant"), "message 2 is a system message; it must be the first"),
    (roles("user", "user", "assistant"), "messages 1 and 2 are both the user's"),
    (roles("assistant", "user"), "message 1 is the assistant's, before any"),
    (roles("user", "tool", "assistant"), "message 2 is a tool's result, and no call"),
    (roles("user"), "no answer to train on"),
    (dialog(answer=" "), "message 2 is an empty answer"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "a message from 'bot'; known are human"),
    ({"conversations": [{"role": "user"}]}, "lacks from and value"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f("}]},
     "function_call is no JSON"),
    ({"instruction": "i", "output": ""}, "output is empty"),
    ({"instruction": "", "output": "o"}, "instruction is empty"),
    ({"instruction": "i", "output": "o", "history": ["q"]}, "history is no list of pairs"),
    ({"prompt": "p", "completion": ""}, "completion is empty"),
    (dialog() | {"tools": "["}, "tools is a text, and no JSON"),
    (dialog() | {"tools": 3}, "tools is a number"),
    (dialog() | {"tools": [{}]}, "give an object with name"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "the row is a preference, which DPO"),
    ("\ud800", "lone surrogate"),
    ("{", "the line is no JSON"),
    (dialog("\ud800"), "lone surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_faults_name_file_and_line_or_are_counted(demo, tmp_path, row, fault):  # noqa: F811
    line = row if row == "{" else json.dumps(row)
    path = write(tmp_path, "rows.jsonl", [dialog(), "", line, dialog()])
    with pytest.raises(DataError, match=fault) as raised:
        read(path, demo)
    assert (raised.value.file, raised.value.line) == (path, 3)
    assert str(raised.value).startswith(f"{path}, line 3: ")
    data = read(path, demo, on_error="skip")
    assert (data.report.rows, data.report.documents) == (3, 2)
    assert list(data.report.dropped.values()) == [1]
    assert list(data.report.examples.values()) == [f"{path}, line 3"]
    assert "1 dropped" in str(data.report)


def test_arrays_lines_and_texts_give_the_same(demo, tmp_path):  # noqa: F811
    rows = [dialog("a"), dialog("b", "é"), {"text": "free [text]"}]
    wanted = read(write(tmp_path, "a.jsonl", rows), demo)
    for name, array in (("b.json", True), ("c.jsonl", True), ("d.json", False)):
        found = read(write(tmp_path, name, rows, array), demo)
        assert found.batch(range(len(found))).tokens.equal(wanted.batch(range(len(wanted))).tokens)
    (tmp_path / "e.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(dialog("a"), indent=2).encode())
    assert len(read(tmp_path / "e.json", demo)) == 1
    text = tmp_path / "t" / "f.txt"
    text.parent.mkdir()
    text.write_text("free [text]\n")
    (text.parent / "README.md").write_text("This is no data.")
    tokens = read(text.parent, demo, block=100).batch([0]).tokens[0].tolist()
    assert tokens == demo.encode("free [text]\n", bos=True)


@pytest.mark.parametrize(
    ("content", "line", "fault"),
    [
        (b'[{"text": "a"},\n{"text": "b"}', 2, 'lacks "," or its end'),
        (b'[{"text": "a"},\n{"text": }]', 2, "the JSON array is broken here"),
        (b'[{"text": "a"}]\nx', 1, "text follows the end"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 2, "is not UTF-8 text"),
        (b'{"text": "a"}\n{"text": "\xff"}', 2, "byte 10 (0xff) is not UTF-8 text"),
        (b"  \n ", 1, "the file is empty"),
        (b"", 1, "the file is empty"),
    ],
)
def test_broken_files(demo, tmp_path, content, line, fault):  # noqa: F811
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(path, demo)
    assert fault in str(raised.value) and raised.value.line == line
    # Skipped, the rest of the data is there.
    good = write(tmp_path, "good.jsonl", [dialog()])
    data = read([path, good], demo, on_error="skip")
    assert sum(data.report.dropped.values()) == 1
    with pytest.raises(
        DataError, match="nothing is left to train on|is not UTF-8|" + "file is empty"
    ):
        read(write(tmp_path, "y.jsonl", ["{"]), demo, on_error="skip")


def test_other_files_and_settings(demo, tmp_path, monkeypatch):  # noqa: F811
    path = write(tmp_path, "a.jsonl", [dialog("long " * 50)])
    (tmp_path / "b.txt").write_bytes(b"a\nb\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.bin").write_bytes(b"x")
    for given_, settings_, problem in (
        (tmp_path / "none.txt", {}, "there is no such file"),
        (tmp_path / "p.bin", {}, "a file .bin is unknown; give .txt"),
        (tmp_path / "empty", {}, "the folder holds no data files"),
        ([], {}, "no files of training data"),
        (tmp_path / "b.txt", {}, r"line 2: byte 3 \(0xff\) is not UTF-8"),
        (path, {"block": 0}, "block is 0"),
        (path, {"train_on": "user"}, "train_on='user' is unknown; give one of answers, last, all"),
        (path, {"on_error": "ignore"}, "on_error='ignore' is unknown"),
        (path, {"too_long": "split"}, "too_long='split' is unknown"),
        (path, {"stride": 3000}, "stride is 3000; give 1"),
    ):
        with pytest.raises(DataError, match=problem):
            read(given_, demo, **settings_)
    monkeypatch.setattr("llama_fast.training.rows.MAX_LINE", 100)
    with pytest.raises(DataError, match="line 1: the line has more than"):
        read(path, demo)


def test_preferences_are_read_for_dpo(tmp_path):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2
    assert len(list(read_preferences(write(tmp_path, "a.jsonl", rows)))) == 2
    with pytest.raises(DataError, match="line 2: the row is no preference"):
        list(read_preferences(write(tmp_path, "b.jsonl", [*rows[:1], dialog()])))


KEYS = ["text", "messages", "conversations", "instruction", "input", "output", "history", "system",
        "prompt", "completion", "chosen", "rejected", "tools", "role", "content", "from", "value",
        "tool_calls", "function", "name", "arguments", "type", "parameters"]  # fmt: skip
SCALARS = ["", "x", "user", "assistant", "human", "gpt", "system", "tool", "function_call", "text",
           "observation", '{"name": "f", "arguments": {}}', "[]", 0, 1.5, None, True]  # fmt: skip
anything = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=30,
)


VALID = [
    MIXED,
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": "[]",
    },
    {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    {"prompt": "p", "chosen": "c", "rejected": "r"},
]  # fmt: skip


@st.composite
def odd_rows(draw):
    """A valid row in which one value, wherever in it, is another."""
    row = copy.deepcopy(draw(st.sampled_from(VALID)))
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(row)
    node, key = draw(st.sampled_from(places))
    node[key] = draw(anything)
    return row


@settings(max_examples=100, deadline=None)
@given(odd_rows() | anything)
def test_any_row_is_parsed_or_refused(value):
    """Skipping rows with faults must not end at a row that is odd in a new way."""
    vocabulary = tokenizer_of_demo()
    for form in ("meta", "hf"):
        with contextlib.suppress(DataError, PromptError, TokenizerError):
            row = parse_row(value)
            found = example(row, vocabulary, ChatFormat(vocabulary, "3.1", form=form), "answers")
            assert len(found.ids) == len(found.mask)


FILES = [
    b'[{"text": "a"},\n {"text": "b"}]',
    b'{"text": "a"}\n\n{"text": "\xc3\xa9"}\r\n',
    b'\xef\xbb\xbf{\n "text": "a"\n}',
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FILES), st.data(), st.sampled_from([".json", ".txt"]))
def test_any_file_is_read_or_refused(content, draw, suffix):
    """Bytes put in, taken out or changed make faults, and never other exceptions."""
    start = draw.draw(st.integers(0, len(content)))
    end = draw.draw(st.integers(start, min(start + 3, len(content))))
    new = draw.draw(st.binary(max_size=3) | st.sampled_from([b"[", b"]", b"{", b"\n", b'"', b","]))
    content = content[:start] + new + content[end:]
    rows = list(raw_rows(Path(f"x{suffix}"), content))
    assert rows and all(1 <= row.line <= content.count(b"\n") + 1 for row in rows)
