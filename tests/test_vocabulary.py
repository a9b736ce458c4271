"""Longer and shorter vocabularies: against tiktoken, against Hugging Face's tokenizers, and by the
rule that a longer one only joins tokens of the old one."""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from itertools import accumulate

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.errors import TokenizerError
from llama_fast.tokenizer import PIECES, Tokenizer, corpus, vocabulary
from llama_fast.tokenizer.bpe import Trainer, merge, train_bpe
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.tokenizer.special_tokens import EOT, special_ids

MANY = ["".join(random.Random(n).choices("天地玄黄宇宙洪荒日月盈昃", k=12)) for n in range(400)]
SINGLES = [bytes([b]) for b in BYTE_ORDER]
ENGLISH = "the cat sat on the mat and the other cat sat there; banana, bananas, bandana! 12 1234\n"
CHINESE = "有中文字幕的电影，没有文字幕的电影。你好，世界！猫和狗在花园里玩，太阳很大，花很红。\n"
# Characters that this Python knows: newer ones are letters to one regex library and not to another.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
ODD = st.sampled_from(
    [*"猫狗花园电影文字幕中有的。，a b1\n\t", "文字幕", "the", " cat", "😀", "👩‍👩‍👧", "é",
     "e\u0301", "\x00", "\x1b", "\ufeff", "<|eot_id|>",
     "<|reserved_special_token_3|>", "<|begin_of_text|>", "１２",
     "שלום", "مرحبا", "Привет", "한국어", "かな", "aaaaaaaaaaaa", "    ", "\r\n\r\n",
     "'S", "�", "𠮷"]
)  # fmt: skip
TEXTS = st.one_of(st.lists(ODD, max_size=25).map("".join), st.text(CHARACTERS, max_size=30))


@pytest.fixture(scope="module")
def old():
    """A vocabulary with a token that merging its other tokens cannot reach."""
    tokens = train_bpe([ENGLISH * 3 + CHINESE * 2], 300)
    return Tokenizer([*tokens, "中文字幕".encode(), b" bandanas"], specials="hf")


@pytest.fixture(scope="module")
def longer(old):
    return vocabulary.extend(old, [CHINESE * 3, ENGLISH * 2], 60)


@pytest.fixture(scope="module")
def theirs(longer, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    longer.save_json(path)
    return tokenizers.Tokenizer.from_file(str(path))


def borders(tokenizer: Tokenizer, ids: list[int]) -> set[int]:
    return set(accumulate(len(tokenizer.id_to_bytes[id_]) for id_ in ids))


# --- extend


def test_old_ids_stay_and_new_ones_follow_the_special_tokens(old, longer):
    assert longer.id_to_bytes[: old.vocab_size] == old.id_to_bytes
    assert longer.specials == old.specials and longer.n_ranks == old.n_ranks == 302
    assert longer.vocab_size == old.vocab_size + 60 == len(longer.id_to_bytes)
    assert longer.stop_ids == old.stop_ids and longer.bos_id == old.bos_id == 302
    assert all(old.ranks[token] == id_ for token, id_ in longer.ranks.items() if id_ < 302)
    assert not old.ranks.keys() & {longer.id_to_bytes[i] for i in range(558, 618)}


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_the_new_encoding_joins_tokens_of_the_old_one(old, longer, text):
    before, after = old.encode(text), longer.encode(text)
    assert borders(longer, after) <= borders(old, before)
    assert longer.decode(after) == text
    assert not set(after) & set(longer.special_names), "special-looking text is text"


def test_old_tokens_that_were_out_of_reach_are_merged_at_once(old, longer):
    text = "有中文字幕的"
    target = old.ranks["中文字幕".encode()]
    assert target not in old.encode(text), "else this tests nothing"
    words = [(list(map(old.id_to_bytes.__getitem__, old.encode(text))), 5)]
    trainer = Trainer(words, old.ranks)
    trainer.train(30)
    assert "中文字幕".encode() not in trainer.new
    assert old.encode("中文字幕") == longer.encode("中文字幕") == [target]


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(st.lists(st.text("abc", max_size=20)).map(" ".join), TEXTS),
    extra=st.lists(st.text("abc", min_size=2, max_size=7), max_size=4, unique=True),
)
def test_the_encoder_segments_as_the_trainer_did(text, extra):
    """Whatever tokens the old vocabulary has, reachable or not."""
    base = Tokenizer([*SINGLES, *(word.encode() for word in extra)], specials={})
    found = Counter(PIECES.findall(text))
    words = {p: [base.id_to_bytes[i] for i in base.encode(p)] for p in found}
    trainer = Trainer([(parts, found[p]) for p, parts in words.items()], base.ranks)
    trainer.train(25)
    new = Tokenizer([*base.id_to_bytes, *trainer.new], specials={})
    for piece, parts in zip(words, trainer.parts, strict=True):
        assert [new.id_to_bytes[i] for i in new.encode(piece)] == parts
    assert len(set(trainer.new)) == len(trainer.new) and not base.ranks.keys() & set(trainer.new)


def test_merge_is_tiktoken_s(longer):
    for token in [*longer.ranks, *(word.encode() for word in (ENGLISH + CHINESE).split())]:
        parts, _ = merge(token, longer.ranks)
        if len(parts) > 1 and token in longer.ranks:
            continue  # out of reach: the encoder takes it whole
        try:
            piece = token.decode()
        except UnicodeDecodeError:
            continue
        if PIECES.findall(piece) == [piece]:
            assert [longer.id_to_bytes[i] for i in longer.encode(piece)] == parts


def test_what_spells_a_new_token(old, longer):
    new = vocabulary.new_tokens(longer, old)
    assert list(new) == list(range(558, 618))
    for id_, spelled in new.items():
        assert b"".join(old.id_to_bytes[i] for i in spelled) == longer.id_to_bytes[id_]
        assert len(spelled) > 1 and max(spelled) < old.n_ranks
    after = longer.encode(CHINESE)
    assert [o for id_ in after for o in new.get(id_, [id_])] == old.encode(CHINESE)


def test_twice_extended(old, longer, tmp_path):
    again = vocabulary.extend(longer, ["我们去山上看月亮，the owl looked. " * 4], 10)
    assert again.id_to_bytes[:618] == longer.id_to_bytes and again.vocab_size == 628
    assert list(vocabulary.new_tokens(again, longer)) == list(range(618, 628))
    assert len(vocabulary.new_tokens(again, old)) == 70
    with pytest.raises(TokenizerError, match="extended already"):
        vocabulary.extend(longer, [CHINESE], 5, use_reserved=True)


def test_reserved_tokens_give_their_ids(old, tmp_path):
    new = vocabulary.extend(old, [CHINESE * 3], 20, use_reserved=True)
    assert new.vocab_size == old.vocab_size and len(new.specials) == 236
    ids = [id_ for name, id_ in old.specials.items() if "reserved" in name][:20]
    assert list(vocabulary.new_tokens(new, old)) == ids
    assert new.specials.items() <= old.specials.items() and EOT in new.specials
    assert "<|reserved_special_token_0|>" not in new.specials
    assert set(new.encode(CHINESE)) & set(ids)
    new.save_json(tmp_path / "tokenizer.json")
    read = Tokenizer.from_pretrained(tmp_path)
    assert (read.ranks, read.specials, read.n_ranks) == (new.ranks, new.specials, 302)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert hf.encode(CHINESE, add_special_tokens=False).ids == new.encode(CHINESE)
    more = vocabulary.extend(old, MANY, 300, use_reserved=True)
    assert more.vocab_size == old.vocab_size + 300 - sum("reserved" in n for n in old.specials)


def test_only_characters_of_a_script(old):
    new = vocabulary.extend(old, [(CHINESE + "，你好，" + ENGLISH) * 4], 40, scripts=["Han"])
    for id_ in vocabulary.new_tokens(new, old):
        text = new.id_to_bytes[id_].decode(errors="ignore")
        assert all("\u4e00" <= char <= "\u9fff" for char in text)
    with pytest.raises(TokenizerError, match=r"'Klingon'.*Han"):
        vocabulary.extend(old, [CHINESE], 5, scripts=["Klingon"])
    with pytest.raises(TokenizerError, match="characters of Cyrillic"):
        vocabulary.extend(old, [CHINESE], 5, scripts=["Cyrillic"])


def test_stretches_of_a_script():
    tokenizer = Tokenizer(SINGLES, specials={})
    found = Counter(["，你好", "a狗b猫猫"])
    assert sorted(b"".join(w).decode() for w, _ in corpus.words(found, tokenizer, ["Han"])) == [
        "你好", "狗", "猫猫"
    ]  # fmt: skip


def test_order_and_repetition(old):
    lines = (CHINESE * 2 + ENGLISH * 2 + "花花花花").splitlines(keepends=True)
    expected = vocabulary.extend(old, lines, 30).id_to_bytes
    random.Random(1).shuffle(lines)
    assert vocabulary.extend(old, iter(lines), 30).id_to_bytes == expected


def test_memory_is_bounded_and_counts_stay_right_on_average():
    tokenizer = Tokenizer(SINGLES, specials={})
    texts = [f"猫{chr(0x4E00 + n)}" for n in range(4000)] * 2 + ["the"] * 500
    found = corpus.count_pieces(texts, tokenizer, max_pieces=1000)
    assert len(found) <= 1000 and found["the"] == 500
    assert 6000 < found.total() - 500 < 10_000


@pytest.mark.parametrize(
    ("texts", "n", "options", "message"),
    [
        ([], 5, {}, "no text"),
        (["", ""], 5, {}, "no text"),
        (["a"], 5, {}, "nothing to join"),
        ([CHINESE], 5000, {}, r"gives \d+ new tokens.*not 5000"),
        (["xyxyxy"], 3, {"min_count": 50}, "0 new tokens whose pair occurs 50 times"),
        (CHINESE, 5, {}, r"\[text\]"),
        ([CHINESE], 0, {}, "n is 0"),
        ([CHINESE], 2.5, {}, r"n is 2\.5"),
        ([CHINESE], 5, {"min_count": 0}, "min_count is 0"),
        (["\ud800"], 5, {}, "surrogate"),
    ],
)
def test_refusals(old, texts, n, options, message):
    with pytest.raises(TokenizerError, match=message):
        vocabulary.extend(old, texts, n, **options)


def test_one_giant_line_and_long_runs(old):
    new = vocabulary.extend(old, ["花园电影" * 40_000], 8)
    assert len(new.encode("花园电影" * 100)) < 210 < len(old.encode("花园电影" * 100))


def test_a_vocabulary_that_belongs_to_another(old, longer):
    other = Tokenizer(train_bpe([ENGLISH * 4], 280), specials="hf")
    with pytest.raises(TokenizerError, match="no extension"):
        vocabulary.new_tokens(longer, other)
    with pytest.raises(TokenizerError, match=r"no extension.*id 558 is nothing"):
        vocabulary.new_tokens(old, longer)
    with pytest.raises(TokenizerError, match="nothing to extend"):
        vocabulary.new_tokens(old, old)


# --- tokenizer.json


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_hugging_face_reads_the_same_ids(longer, theirs, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == longer.encode(text, allowed_special="all")


def test_thousands_of_odd_texts(longer, theirs):
    draw = random.Random(7)
    odd = [
        *"猫狗花园电影文字幕中有的。，ab 1\n\t",
        "文字幕",
        "中文字幕",
        " bandanas",
        "😀",
        "\x00",
        "𠮷",
        "é",
    ]
    odd += [chr(draw.randrange(0x20, 0x3000)) for _ in range(60)]
    odd = [char for char in odd if len(char) > 1 or unicodedata.category(char) != "Cn"]
    texts = ["".join(draw.choices(odd, k=draw.randrange(1, 40))) for _ in range(3000)]
    expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [longer.encode(text) for text in texts] == expected


def test_our_reader_and_transformers(longer, theirs, tmp_path):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    longer.save_json(path)
    read = Tokenizer.from_file(path)
    for name in ("ranks", "n_ranks", "specials", "added", "id_to_bytes", "bos_id", "stop_ids"):
        assert getattr(read, name) == getattr(longer, name), name
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = CHINESE + ENGLISH
    assert fast(text)["input_ids"] == [longer.bos_id, *longer.encode(text)]
    assert fast.convert_tokens_to_ids(EOT) == longer.eot_id and len(fast) == longer.vocab_size
    assert fast.decode(longer.encode(text)) == text


def test_json_of_a_vocabulary_that_was_never_extended(old, tmp_path):
    old.save_json(tmp_path / "tokenizer.json")
    assert Tokenizer.from_pretrained(tmp_path).id_to_bytes == old.id_to_bytes
    with pytest.raises(TokenizerError, match="cannot be written"):
        old.save_json(tmp_path / "tokenizer.json" / "below")


def test_specials_that_stand_in_the_vocabulary_are_no_ranks(longer, tmp_path):
    """They may stand there or not, as other writers have it: the ids are the same."""
    longer.save_json(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["model"]["vocab"].keys() >= longer.specials.keys()
    for name in longer.specials:
        del content["model"]["vocab"][name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.ranks == longer.ranks and read.specials == longer.specials


def test_an_added_word_that_is_a_token_too(old, tmp_path):
    """ "at" is merged in other words also where it is an added word; "<|x|>" is a word alone."""
    tokens = list(old.id_to_bytes[: old.n_ranks])
    at = tokens.index(b"at")
    specials = special_ids("hf", len(tokens))
    both = Tokenizer(tokens, specials=specials, added={"at": at, "<|x|>": len(tokens) + 256})
    both = vocabulary.extend(both, [CHINESE * 2], 5)
    both.save_json(tmp_path / "tokenizer.json")
    read = Tokenizer.from_pretrained(tmp_path)
    assert read.ranks == both.ranks and read.added == both.added
    assert b"<|x|>" not in read.ranks
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the cat, a cats<|x|>", CHINESE):
        assert hf.encode(text, add_special_tokens=False).ids == read.encode(text)


def test_meta_s_file_cannot_hold_it(longer, tmp_path):
    with pytest.raises(TokenizerError, match="save_json"):
        longer.save(tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_gaps_are_refused():
    with pytest.raises(TokenizerError, match="gaps"):
        Tokenizer([*SINGLES, None, b"ab"], specials={})
    with pytest.raises(TokenizerError, match="are equal"):
        Tokenizer([*SINGLES, None, b"a"], specials={"<x>": 256})


# --- prune


def test_pruned(longer):
    text = "猫和狗在花园里玩，the cat sat"
    short, kept = vocabulary.prune(longer, [text])
    assert kept == sorted(kept) and len(kept) == short.vocab_size < longer.vocab_size
    assert [short.id_to_bytes[n] for n in range(len(kept))] == [longer.id_to_bytes[o] for o in kept]
    assert short.specials.keys() == longer.specials.keys()
    assert all(kept[short.specials[name]] == id_ for name, id_ in longer.specials.items())
    assert {kept[id_] for id_ in short.stop_ids} == longer.stop_ids
    assert [kept[id_] for id_ in short.encode(text)] == longer.encode(text)


@settings(max_examples=200, deadline=None)
@given(corpus_text=TEXTS.filter(bool), text=TEXTS)
def test_texts_whose_ids_are_kept_are_encoded_as_before(longer, corpus_text, text):
    short, kept = vocabulary.prune(longer, [corpus_text])
    assert short.decode(short.encode(text)) == text
    for each in (corpus_text, text):
        before = longer.encode(each)
        if set(before) <= set(kept):
            assert [kept[id_] for id_ in short.encode(each)] == before


def test_pruned_and_written(longer, tmp_path):
    short, _ = vocabulary.prune(longer, [CHINESE])
    short.save_json(tmp_path / "tokenizer.json")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (CHINESE, ENGLISH, "𠮷 <|eot_id|>"):
        assert hf.encode(text).ids == [short.bos_id, *short.encode(text, allowed_special="all")]
    with pytest.raises(TokenizerError, match="no text"):
        vocabulary.prune(longer, [])
    with pytest.raises(TokenizerError, match=r"\[text\]"):
        vocabulary.prune(longer, CHINESE)
    rare, _ = vocabulary.prune(longer, [CHINESE, ENGLISH * 3], min_count=2)
    assert rare.vocab_size < vocabulary.prune(longer, [CHINESE, ENGLISH * 3])[0].vocab_size
