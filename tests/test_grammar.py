"""Grammars: what an answer must be is what it is, and the rest of the distribution stays."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast.errors import PromptError
from llama_fast.generation.generate import generate, stream
from llama_fast.generation.grammar import Grammar, allowed_by, masked
from llama_fast.generation.session import Session
from llama_fast.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="needs the extra grammar")

DEMO = Path(llama_fast.__file__).parent / "demo"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["dog", "cat"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return llama_fast.Llama.from_pretrained(DEMO, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DEMO)


def test_json_schema(model, tokenizer):
    grammar = Grammar.json_schema(PERSON)
    prompts = ["Once upon a time", "The dog", "{", "狗"]
    for temperature in (0, 1.5):
        for found in generate(
            model, tokenizer, prompts, grammar=grammar, seed=3, temperature=temperature
        ):
            assert found.finish_reason == "stop", found
            person = json.loads(found.text)
            assert list(person) == ["name", "age", "pets"]
            assert isinstance(person["name"], str) and len(person["name"]) <= 12
            assert type(person["age"]) is int and 0 <= person["age"] <= 99
            assert set(person["pets"]) <= {"dog", "cat"} and len(person["pets"]) <= 2
            assert found.text == json.dumps(person, ensure_ascii=False)  # the form is Python's


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3,5}(dog|cat)", "[0-9]{1,3}(,[0-9]{1,3}){2}!", "(狗|猫){1,9}。"]
)
def test_regex(model, tokenizer, pattern):
    found = generate(
        model, tokenizer, ["One", "Two"], grammar=Grammar.regex(pattern), seed=1, max_new_tokens=80
    )
    for one in found:
        assert one.finish_reason == "stop" and re.fullmatch(pattern, one.text), one


def test_lark(model, tokenizer):
    source = 'start: pair ("+" pair)~0..5 "."\npair: "(" DIGIT "," DIGIT ")"\nDIGIT: /[0-9]/'
    (found,) = generate(
        model, tokenizer, "Sums:", grammar=Grammar.lark(source), seed=4, max_new_tokens=300
    )
    assert re.fullmatch(r"\(\d,\d\)(\+\(\d,\d\)){0,5}\.", found.text)


def test_a_grammar_of_everything_changes_nothing(model, tokenizer):
    prompts = ["Once upon a time", "The cat", "Q: "]
    asked = {"seed": 7, "max_new_tokens": 60}
    plain = generate(model, tokenizer, prompts, **asked)
    found = generate(model, tokenizer, prompts, grammar=Grammar.regex(r"(?s:.)*"), **asked)
    assert [one.text for one in found] == [one.text for one in plain]
    assert [one.logprobs for one in found] == [one.logprobs for one in plain]


def test_the_end_waits_for_the_grammar(tokenizer):
    matcher = Grammar.regex("ab*c?").matcher(tokenizer, frozenset(tokenizer.stop_ids))
    stops, specials = sorted(tokenizer.stop_ids), sorted(tokenizer.special_names)
    allowed = matcher.allowed()
    assert allowed.shape == (tokenizer.vocab_size,)
    assert not allowed[specials].any() and {id_[:1] for id_ in spelled(tokenizer, allowed)} == {
        b"a"
    }
    (a,) = tokenizer.encode("a")
    matcher.push(a)
    allowed = matcher.allowed()
    assert allowed[stops].all() and allowed[specials].sum() == len(stops)
    assert not matcher.ended
    (c,) = tokenizer.encode("c")
    matcher.push(c)
    assert matcher.ended
    allowed = matcher.allowed()
    assert allowed[stops].all() and allowed.sum() == len(stops)


def spelled(tokenizer, allowed):
    return [tokenizer.id_to_bytes[id_] for id_ in allowed.nonzero()[0]]


def test_a_stop_token_that_is_no_special_ends_no_string():
    """Fine-tunes end their texts with an added word."""
    tokens = [bytes([b]) for b in range(256)]
    tokenizer = Tokenizer(tokens, specials={}, added={"<|im_end|>": 256})
    tokenizer.stop_ids |= {256}
    matcher = Grammar.regex('"[^"]*"').matcher(tokenizer, frozenset(tokenizer.stop_ids))
    for byte in b'"<':
        assert not matcher.allowed()[256]
        matcher.push(byte)
    matcher.push(ord('"'))
    assert matcher.allowed().nonzero()[0].tolist() == [256] and matcher.ended


def test_without_stop_tokens_a_text_ends_where_nothing_can_follow():
    tokenizer = Tokenizer([bytes([b]) for b in range(256)], specials={})
    config = llama_fast.LlamaConfig(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32, vocab_size=260,
        max_seq_len=64,
    )  # fmt: skip
    torch.manual_seed(0)
    small = llama_fast.Llama(config, device="cpu").eval()
    (found,) = generate(small, tokenizer, "x", grammar=Grammar.regex("[a-z]{4}"), seed=0)
    assert re.fullmatch("[a-z]{4}", found.text) and found.finish_reason == "stop"


def test_masked_changes_refused_logits_alone(tokenizer):
    matcher = Grammar.regex("[0-9]").matcher(tokenizer, frozenset(tokenizer.stop_ids))
    logits = torch.randn(3, tokenizer.vocab_size, device="cpu")
    before = logits.clone()
    found = masked(logits, [None, allowed_by(matcher), None])
    assert torch.equal(logits, before)
    assert torch.equal(found[0], before[0]) and torch.equal(found[2], before[2])
    kept = torch.from_numpy(matcher.allowed())
    assert torch.equal(found[1][kept], before[1][kept]) and found[1][~kept].isneginf().all()
    assert spelled(tokenizer, matcher.allowed()) == [b"%d" % n for n in range(10)]
    assert masked(logits, [None] * 3) is logits


def test_stream_and_session(model, tokenizer):
    grammar = Grammar.regex("[0-9]{3}-[0-9]{2}")
    chunks = list(stream(model, tokenizer, "Number: ", grammar=grammar, seed=2))
    text = "".join(chunk.text for chunk in chunks)
    assert re.fullmatch(r"\d{3}-\d{2}", text) and chunks[-1].finish_reason == "stop"
    with Session(model, tokenizer) as session:
        found = session.stream("Number: ", grammar=grammar, seed=2)
        assert "".join(chunk.text for chunk in found) == text


NESTED: dict = {}
for _ in range(500):
    NESTED = {"type": "object", "properties": {"a": NESTED}}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", ""),
        ("regex", None),
        ("lark", "start: foo"),
        ("lark", "not a grammar"),
        ("lark", 5),
        ("json_schema", {"type": "foo"}),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}),
        ("json_schema", {"$ref": "http://127.0.0.1:9/x"}),
        ("json_schema", {"a": object()}),
        ("json_schema", "{"),
        ("json_schema", NESTED),
        ("json_schema", 3.5),
    ],
)
def test_what_is_no_grammar_is_refused(model, tokenizer, kind, source):
    with pytest.raises(PromptError):
        generate(model, tokenizer, "x", grammar=getattr(Grammar, kind)(source))


def test_a_text_in_the_place_of_a_grammar_is_refused(model, tokenizer):
    with pytest.raises(PromptError, match="give a Grammar"):
        stream(model, tokenizer, "x", grammar="[a-z]+")


def test_a_grammar_that_the_vocabulary_cannot_spell(tokenizer):
    with pytest.raises(PromptError):
        matcher = Grammar.lark("start: <|no_such_token|>").matcher(tokenizer, frozenset())
        matcher.allowed()


def test_without_llguidance_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PromptError, match=r"llama_fast\[grammar\]"):
        Grammar.regex("a")
