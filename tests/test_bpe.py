"""The BPE trainer against a plain trainer that recounts everything, and against tiktoken."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_fast.errors import TokenizerError
from llama_fast.tokenizer import PIECES, Tokenizer
from llama_fast.tokenizer.bpe import Trainer, train_bpe
from llama_fast.tokenizer.files import BYTE_ORDER

TEXT = """the cat sat on the mat and the other cat sat there; banana, bananas, bandana! 12 1234 12
你好，世界。你好，朋友。世界很大，朋友很多。 aaaa aaaaa aaaaaaa abababab\n\n\n"""
# Characters that this Python knows: newer ones are letters to one regex library and not to another.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
# Repetitive words overlap with themselves, where the order of merging matters.
TEXTS = st.one_of(
    st.lists(st.text("ab", max_size=14)).map(" ".join),
    st.lists(st.text("abc", max_size=20)).map(" ".join),
    st.text(st.one_of(st.sampled_from("ab 猫狗\n1"), CHARACTERS)),
)


def plain_train(text: str, vocab_size: int) -> list[bytes]:
    """Encodes all pieces anew with tiktoken at every step. Stops where no pair occurs twice."""
    tokens = [bytes([b]) for b in BYTE_ORDER]
    pieces = Counter(PIECES.findall(text))
    while len(tokens) < vocab_size:
        tokenizer, pairs = Tokenizer(tokens), Counter()
        for piece, count in pieces.items():
            parts = [tokens[i] for i in tokenizer.encode(piece)]
            for a, b in itertools.pairwise(parts):
                pairs[a + b] += count
        best = min(pairs, key=lambda made: (-pairs[made], made), default=b"")
        if pairs[best] < 2:
            break
        tokens.append(best)
    return tokens


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_same_tokens_as_a_plain_trainer(text):
    expected = plain_train(text, 256 + 12)
    assume(len(expected) > 256)
    assert train_bpe([text], len(expected)) == expected


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_tiktoken_segments_as_the_trainer_did(text):
    pieces = Counter(PIECES.findall(text))
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in pieces.items()]
    trainer = Trainer(words, {bytes([b]): rank for rank, b in enumerate(BYTE_ORDER)})
    trainer.train(40)
    tokenizer = Tokenizer([*(bytes([b]) for b in BYTE_ORDER), *trainer.new])
    for piece, parts in zip(pieces, trainer.parts, strict=True):
        ids = tokenizer.encode(piece)
        assert [tokenizer.id_to_bytes[i] for i in ids] == parts


def test_bytes_then_merges_by_frequency():
    """By hand: of "ab", " ab" twice and " abc" twice, `ab` occurs 5 times, then ` `+`ab` 4."""
    tokens = train_bpe(["ab ab ab abc abc"], 259)
    assert tokens[:256] == [bytes([b]) for b in BYTE_ORDER]
    assert tokens[256:] == [b"ab", b" ab", b" abc"]
    assert train_bpe(["xy zy xy zy"], 258)[256:] == [b" z", b" zy"]  # ties: first in byte order


def test_the_order_of_texts_does_not_matter():
    lines = TEXT.splitlines(keepends=True) * 3
    expected = train_bpe(lines, 300)
    random.Random(0).shuffle(lines)
    assert train_bpe(iter(lines), 300) == expected


def test_progress_and_refusals():
    steps = []
    train_bpe([TEXT], 260, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(TokenizerError, match="255"):
        train_bpe([TEXT], 255)
    with pytest.raises(TokenizerError, match="more text"):
        train_bpe(["ab ab"], 300)
    with pytest.raises(TokenizerError, match=r"\[text\]"):
        train_bpe(TEXT, 300)
