"""Messages read back from what a model made: every form of a call, several calls, and malformed
ones, which stay text. Nothing that a model writes raises."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.errors import PromptError, TokenizerError
from llama_fast.tokenizer import ChatFormat, Message, Tokenizer, ToolCall, decode_message

from .test_chat import DEMO, WEATHER, demo  # noqa: F401  a fixture

F, G = ToolCall("f", {"a": "x"}), ToolCall("g", {})
NESTED = {"a": {"b": [1, {"c": '</function> "it\'s" }'}]}, "n": None}


def message(content: str = "", *calls: ToolCall) -> Message:
    return Message("assistant", content, calls)


BOTH = message("", F, G)
LITERALS = {"a": "it's", "b": [1, -2.5, {"k": [True, None]}], "c": True}


@pytest.mark.parametrize(
    ("text", "wanted", "kinds"),
    [
        ("Hello.", message("Hello."), ""),
        ('{"name": "f", "parameters": {"a": "x"}}', message("", F), "json"),
        ('{"type": "function", "name": "f", "parameters": {"a": "x"}}', message("", F), "json"),
        ('{"name": "f", "arguments": {"a": "x"}}', message("", F), "json"),
        ('{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}', message("", F), "json"),
        ('{"type": "function", "function": "f", "parameters": {"a": "x"}}', message("", F), "json"),
        (
            '{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}',
            message("", F),
            "json",
        ),
        ('{"type": "function", "name": "g"}', message("", G), "json"),
        ('{"name": "g", "parameters": null}', message("", G), "json"),
        ('{"name":"f","parameters":{"a":"x"}}; {"name":"g","parameters":{}}', BOTH, "json json"),
        ('{"name":"f","parameters":{"a":"x"}}\n{"name":"g","parameters":{}}\n', BOTH, "json json"),
        ('[{"name":"f","parameters":{"a":"x"}},\n{"name":"g","parameters":{}}]', BOTH, "json json"),
        ('I look.\n{"name": "f", "parameters": {"a": "x"}}', message("I look.", F), "json"),
        (f'<function=f>{json.dumps(NESTED)}</function>', message("", ToolCall("f", NESTED)), "tag"),
        ('<function=f>{"a": "x"}</function>\n<function=g>{}</function>', BOTH, "tag tag"),
        ('I look.\n<function=f> {"a": "x"} </function>', message("I look.", F), "tag"),
        ("[f(a='x'), g()]", BOTH, "python_list python_list"),
        (
            '[ns.f(a="it\'s", b=[1, -2.5, {"k": (True, None)}], c=true)]',
            message("", ToolCall("ns.f", LITERALS)),
            "python_list",
        ),
        ('<|python_tag|>brave_search.call(query="a \\"b\\" é")<|eom_id|>',
         message("", ToolCall("brave_search", {"query": 'a "b" é'})), "builtin"),
        ('<|python_tag|>brave_search.call(query="a "b" c")',
         message("", ToolCall("brave_search", {"query": 'a "b" c'})), "builtin"),
        ('<|python_tag|>print("x")\n',
         message("", ToolCall("code_interpreter", {"code": 'print("x")\n'})), "code"),
        ("<|python_tag|>[f(x) for x in y]",
         message("", ToolCall("code_interpreter", {"code": "[f(x) for x in y]"})), "code"),
        ('<|python_tag|>code_interpreter.call(code="1+1")',
         message("", ToolCall("code_interpreter", {"code": "1+1"})), "code"),
        ('Look.<|python_tag|>{"name": "f", "parameters": {"a": "x"}}', message("Look.", F), "json"),
    ],
)  # fmt: skip
def test_calls_are_read(text, wanted, kinds):
    found = decode_message(text)
    assert found == wanted
    assert " ".join(call.kind for call in found.tool_calls) == kinds
    assert found.fault is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"name": "f", "parameters": {"a": "x"', "JSON cannot be read"),
        ('{"name": "f", "parameters": [1]}', "arguments of f are no JSON object"),
        ('{"name": "f", "parameters": "x"}', "arguments of f are no JSON object"),
        ('{"name": "f"}', "no parameters"),
        ('{"name": 3, "parameters": {}}', "no name of a function"),
        ('{"name": "f", "parameters": {}, "mood": 1}', "keys that no call has"),
        ('{"type": "tool", "name": "f", "parameters": {}}', "keys that no call has"),
        ('{"name": "f", "parameters": {}, "arguments": {}}', "both parameters and arguments"),
        ('{"name": "f", "parameters": {}} and so on', "JSON cannot be read"),
        ('<function=f>{"a": 1}', "lacks </function>"),
        ("<function=f>a=1</function>", "JSON cannot be read"),
        ("<function=f>[1]</function>", "arguments of f are no JSON object"),
        ("<function=", "without a name"),
        ("[f(1)]", "arguments without names"),
        ("[f(**a)]", "arguments without names"),
        ("[f(a=1, a=2)]", ""),
        ("[f(a=__import__('os').system('x'))]", "no literal"),
        ("[f(a=b'x')]", "no literal"),
        ("[f(a=1e999)]", "no finite number"),
        ('{"name": "f", "parameters": {"a": NaN}}', "no finite number"),
        ('{"name": "f", "parameters": {"a": -1e999}}', "no finite number"),
        ("[f(a={1: 2})]", "no literal"),
        ("[f(a=1), 2]", "something else than calls"),
        ("[f(a=1)](b)", "no end"),
        ("[f(a='x]", "no Python"),
        ("<|python_tag|>", "nothing follows"),
        ("<|python_tag|>brave_search.call(query=now)", "no literal"),
        ("<|python_tag|>brave_search.call(", "no Python"),
        ('<|python_tag|>{"name": "f", "parameters": 1}', "no JSON object"),
        ("<|python_tag|><function=f>{}</function> x", "text stands between"),
    ],
)  # fmt: skip
def test_malformed_calls_stay_text(text, fault):
    found = decode_message(text)
    assert found == message(text)
    assert fault in found.fault


def test_good_calls_beside_a_malformed_one():
    found = decode_message('<function=f>{"a": "x"}</function><function=g>{</function>')
    assert found == message("<function=g>{</function>", F)
    assert "JSON cannot be read" in found.fault


def test_answers_that_are_no_calls():
    for text in (
        '{"answer": 42}',
        "[1, 2]",
        "see [f] and {x}",
        'a = {"name": "f"}',
        "[f (x)",
        "[]",
    ):
        assert decode_message(text) == message(text)
        assert decode_message(text).fault is None
    # The names of the tools tell a call without parameters from an answer in JSON.
    text = '{"name": "weather"}'
    assert decode_message(text, tools=[WEATHER]) == message("", ToolCall("weather", {}))
    assert decode_message(text) == message(text)


def test_ends_headers_and_what_follows(demo):  # noqa: F811
    ids = (
        ChatFormat(demo)
        .encode([Message("user", "q"), message("a")], add_generation_prompt=False)
        .ids
    )
    turn = ids[-(len(demo.encode("a")) + 1 + len(ChatFormat(demo).header("assistant"))) :]
    for found in (turn, demo.decode(turn), [demo.bos_id, *turn]):
        assert decode_message(found, demo) == message("a")
        assert decode_message(found, demo).end == "eot"
    assert decode_message([*demo.encode("a"), demo.eom_id], demo).end == "eom"
    assert decode_message([*demo.encode("a"), demo.eos_id], demo).end == "eos"
    assert decode_message(demo.encode("a"), demo).end is None
    user = [*ChatFormat(demo).header("user"), *demo.encode("q"), demo.eot_id]
    assert decode_message(user, demo) == Message("user", "q")
    after = decode_message([*demo.encode("a"), demo.eot_id, 5, 6], demo)
    assert after == message("a") and after.fault == "2 tokens follow the end of the message"
    assert decode_message("a<|eot_id|>bc").fault == "2 characters follow the end of the message"
    # In ids only control tokens control: this is the text of one.
    assert decode_message(demo.encode("a<|eot_id|>"), demo) == message("a<|eot_id|>")
    with pytest.raises(PromptError, match="needs their tokenizer"):
        decode_message([1, 2])
    with pytest.raises(TokenizerError, match="outside 0"):
        decode_message([10**6], demo)


def test_many_lines_that_look_like_calls_take_no_time():
    text = '{"name": "f", "parameters": {}} x\n[f(a=1)] x\n' * 20_000
    started = time.process_time()
    assert decode_message(text).content == text
    assert time.process_time() - started < 5


def test_deep_nesting_stays_text():
    for text in ('{"name": ' + "[" * 100_000, "[f(a=" + "[" * 5000 + "]" * 5000 + ")]",
                 "<function=f>" + "[" * 100_000, "[f(a=" + "-" * 5000 + "1)]",
                 "<|python_tag|>brave_search.call(q=" + "(" * 5000,
                 "[f(a=1" + "0" * 5000 + ")]"):  # fmt: skip
        assert decode_message(text).content == text
        assert decode_message(text).fault


# --- Anything

PIECES = [
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", "=", "\n", " ", "f", "1", "-"),
    *(
        '{"name": "f", "parameters": {',
        "<function=f>",
        "</function>",
        "brave_search.call(",
        "[f(a=",
    ),
    *(
        "<|python_tag|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "é",
    ),
    *(
        '"type": "function"',
        "\x00",
        "null",
        "assistant",
        "lambda: 0",
        "f'{a}'",
        "\\u00e9",
        "0x",
        "*",
    ),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_nothing_raises_and_nothing_is_lost(text):
    found = decode_message(text)
    if not found.tool_calls and not found.fault and "<|" not in text:
        assert found.content == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2303), max_size=20) | st.lists(st.integers(2048, 2060), max_size=8))
def test_no_ids_raise(ids):
    decode_message(ids, tokenizer_of_demo())


def tokenizer_of_demo(found=[]):  # noqa: B006  read once
    if not found:
        found.append(Tokenizer.from_file(Path(__file__).parent.parent / DEMO))
    return found[0]


# Any text without lone surrogates, which UTF-8 has not.
ANY = st.characters(exclude_categories=["Cs"])
words = st.text(ANY, max_size=12)
names = st.from_regex(r"\A[a-z_][a-z0-9_]{0,8}\Z").filter(lambda name: name not in KEYWORDS)
KEYWORDS = {"as", "if", "in", "is", "or", "and", "del", "def", "for", "not", "try", "from", "with",
            "else", "elif", "pass", "class", "while", "yield", "break", "raise", "async", "await",
            "global", "import", "lambda", "return", "assert", "except", "finally", "nonlocal",
            "continue"}  # fmt: skip
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(names, values, max_size=3)
contents = st.just("") | words.map(lambda word: f"Say{word.replace('<', '').replace('[', '')}.")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["json", "tag", "python_list"]),
    st.sampled_from(["3.0", "3.1"]),
    st.lists(st.tuples(names, arguments), min_size=1, max_size=3),
    contents,
)
def test_custom_calls_come_back(style, release, calls, content):
    said = message(content.replace("{", ""), *(ToolCall(*call) for call in calls))
    assert there_and_back(ChatFormat(tokenizer_of_demo(), release, tool_style=style), said) == said


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["brave_search", "wolfram_alpha"]), arguments, contents,
    st.sampled_from(["meta", "hf"]),
)  # fmt: skip
def test_builtin_calls_come_back(name, given_arguments, content, form):
    said = message("" if form == "hf" else content, ToolCall(name, given_arguments, "builtin"))
    found = there_and_back(ChatFormat(tokenizer_of_demo(), "3.1", form=form), said)
    assert found == said and found.tool_calls[0].kind == "builtin"


@settings(max_examples=50, deadline=None)
@given(words, contents)
def test_code_comes_back(code, content):
    said = message(content, ToolCall("code_interpreter", {"code": f"x = {code}"}))
    assert there_and_back(ChatFormat(tokenizer_of_demo(), "3.1"), said) == said


def there_and_back(format_: ChatFormat, said: Message) -> Message:
    encoded = format_.encode([said], add_generation_prompt=False)
    answer = [id_ for id_, keep in zip(encoded.ids, encoded.content_of([0]), strict=True) if keep]
    found = format_.decode_message(answer)
    assert found.fault is None
    return found
