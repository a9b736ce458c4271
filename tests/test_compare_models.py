"""The tools of docs/vocabulary.md's worked example: its corpus, and models beside each other."""

from __future__ import annotations

import json

import pytest

from llama_fast.cli.options import DEMO
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.vocabulary import extend
from llama_fast.training.vocabulary import extend_folder
from tools import compare_models
from tools.demo_model.corpus import write

from .small_training import one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_corpus_is_of_its_size_its_language_and_its_split(tmp_path):
    corpus, again, other = (tmp_path / f"{name}.jsonl" for name in "abc")
    n = write(corpus, 20_000, "train", 1.0, seed=7)
    assert n == len(texts(corpus)) > 50
    assert 20_000 <= sum(len(text.encode()) for text in texts(corpus)) < 21_000
    assert sum("\u4e00" <= sign <= "\u9fff" for sign in "".join(texts(corpus))) > 5_000
    write(again, 20_000, "train", 1.0, seed=7)
    assert corpus.read_bytes() == again.read_bytes()
    write(other, 20_000, "combinations", 1.0, seed=7)
    assert not set(texts(corpus)) & set(texts(other))


def test_models_beside_each_other(tmp_path, monkeypatch):
    """A longer vocabulary has fewer tokens, each of more bytes; bits are by byte, so that a model
    whose new rows have learnt nothing has more of them."""
    corpus, longer = tmp_path / "corpus.jsonl", tmp_path / "longer"
    write(corpus, 4_000, "train", 1.0, seed=7)
    extend_folder(DEMO, extend(Tokenizer.from_pretrained(DEMO), texts(corpus), 40), longer)
    monkeypatch.setattr(compare_models, "ROUNDS", 1)
    monkeypatch.setattr(compare_models, "DECODED", 8)
    one, same, other = compare_models.compare(corpus, [DEMO, DEMO, longer])
    assert one[:3] == same[:3] and 0.05 < one.bits_per_byte < 1
    assert other.tokens_per_sentence < one.tokens_per_sentence
    whole = one.tokens_per_sentence * one.bytes_per_token
    assert other.tokens_per_sentence * other.bytes_per_token == pytest.approx(whole)
    assert other.bits_per_byte > one.bits_per_byte
    assert other.bytes_per_second == other.bytes_per_token * other.tokens_per_second > 0
