"""The tokenizer against its golden ids, tiktoken on uncut text, and Hugging Face's tokenizers."""

from __future__ import annotations

import base64
import errno
import json
import pickle
import random
import re

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_fast.errors import TokenizerError
from llama_fast.tokenizer import PIECES, StreamDecoder, Tokenizer
from llama_fast.tokenizer import tokenizer as tokenizer_module
from llama_fast.tokenizer.bpe import train_bpe
from llama_fast.tokenizer.files import BYTE_ORDER, BYTE_TO_CHAR, PATTERN
from llama_fast.tokenizer.special_tokens import special_ids

BYTES = [bytes([b]) for b in BYTE_ORDER]

# --- The published vocabulary may not be shipped. This one has its size and, at their published
# ids, every token that the golden examples below need; the rest is filler that no text contains.

GOLDEN = [  # text, ids without begin and end tokens
    ("This is a test sentence.", [2028, 374, 264, 1296, 11914, 13]),
    ("\n\n", [271]),
    ("system", [9125]),
    ("user", [882]),
    ("assistant", [78191]),
    ("ipython", [23799, 4690]),
    ("你好", [57668, 53901]),
    ("否。", [33476, 1811]),
    ("I'm 12345   x\n\n  y", [40, 2846, 220, 4513, 1774, 256, 865, 271, 220, 379]),
    ("<|eot_id|>", [27, 91, 68, 354, 851, 91, 29]),
    ("You are a helpful assistant.", [2675, 527, 264, 11190, 18328, 13]),
    ("Hello World!", [9906, 4435, 0]),
    (
        "the answer to the ultimate question of life, the universe, and everything is ",
        [1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220],
    ),
]
GOLDEN_TOKENS = {  # id: token, at 256 and above
    **{2028: "This", 374: " is", 264: " a", 1296: " test", 11914: " sentence", 271: "\n\n"},
    **{9125: "system", 882: "user", 78191: "assistant", 23799: "ip", 4690: "ython"},
    **{57668: "你", 53901: "好", 33476: "否", 1811: "。", 2846: "'m", 4513: "123", 1774: "45"},
    **{256: "  ", 865: " x", 379: " y", 354: "ot", 851: "_id", 2675: "You", 527: " are"},
    **{11190: " helpful", 18328: " assistant", 9906: "Hello", 4435: " World", 1820: "the"},
    **{4320: " answer", 311: " to", 279: " the", 17139: " ultimate", 3488: " question"},
    **{315: " of", 2324: " life", 15861: " universe", 323: " and", 4395: " everything", 2983: "42"},
}
# Merges on the way to a golden token inside a longer piece, and a token that no merge can reach.
STEPS = {1000: b"yt", 1001: b"yth", 1002: b"ytho", 1003: "你".encode()[:2], 1004: "好".encode()[:2]}
UNREACHABLE = 100769


def rank_lines(tokens) -> bytes:
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.fixture(scope="session")
def golden_file(tmp_path_factory):
    tokens = BYTES + [b"\xff\xfe%d" % i for i in range(256, 128_000)]
    for id_, text in GOLDEN_TOKENS.items():
        tokens[id_] = text.encode()
    for id_, token in STEPS.items():
        tokens[id_] = token
    tokens[UNREACHABLE] = b"zqzqzq"
    path = tmp_path_factory.mktemp("golden") / "tokenizer.model"
    path.write_bytes(rank_lines(tokens))
    return path


@pytest.fixture(scope="session")
def golden(golden_file):
    return Tokenizer.from_file(golden_file)


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_golden_ids(golden, text, ids):
    assert golden.encode(text) == ids
    assert golden.encode(text, bos=True, eos=True) == [128000, *ids, 128001]
    assert golden.decode(ids) == text


def test_a_piece_that_is_a_token_is_not_merged(golden):
    assert golden.encode("zqzqzq") == [UNREACHABLE]
    assert UNREACHABLE not in golden.encode("zqzqzqz")


def test_sizes_and_named_ids(golden, golden_file):
    assert (golden.n_ranks, golden.vocab_size, len(golden.id_to_bytes)) == (128000, 128256, 128256)
    assert (golden.bos_id, golden.eos_id, golden.eot_id) == (128000, 128001, 128009)
    assert (golden.eom_id, golden.pad_id) == (128008, 128004)
    assert golden.stop_ids == {128001, 128008, 128009}
    assert golden.specials["<|python_tag|>"] == 128010
    assert golden.special_names[128010] == "<|python_tag|>"
    assert golden.id_to_bytes[2983] == b"42" and golden.id_to_bytes[128009] == b"<|eot_id|>"
    old = Tokenizer.from_file(golden_file, specials="3.0")
    assert (old.eom_id, old.pad_id, old.stop_ids) == (None, None, {128001, 128009})


def test_bytes_stand_in_gpt2_order():
    assert sorted(BYTE_ORDER) == list(range(256))
    assert [BYTE_ORDER.index(c) for c in b"!\n "] == [0, 198, 220]
    assert (BYTE_TO_CHAR[ord(" ")], BYTE_TO_CHAR[ord("\n")]) == ("Ġ", "Ċ")


@pytest.mark.parametrize(
    ("table", "names", "last_reserved"),
    [
        ("3.0", {4: "R2", 5: "R3", 8: "R4", 10: "R5", 11: "R6", 12: "R7"}, 250),
        (
            "3.1",
            {4: "finetune_right_pad_id", 5: "step_id", 8: "eom_id"}
            | {10: "python_tag", 11: "image", 12: "R2"},
            245,
        ),
        (
            "hf",
            {4: "finetune_right_pad_id", 5: "R2", 8: "eom_id"}
            | {10: "python_tag", 11: "R3", 12: "R4"},
            247,
        ),
    ],
)
def test_special_tables(table, names, last_reserved):
    ids = special_ids(table, 128000)
    common = {0: "begin_of_text", 1: "end_of_text", 2: "R0", 3: "R1", 6: "start_header_id"}
    common |= {7: "end_header_id", 9: "eot_id", 255: f"R{last_reserved}"}
    for offset, name in (common | names).items():
        name = re.sub(r"^R(\d+)$", r"reserved_special_token_\1", name)
        assert ids[f"<|{name}|>"] == 128000 + offset
    assert sorted(ids.values()) == list(range(128000, 128256))


# --- A small vocabulary in both file formats, and Hugging Face's own tokenizer on it.

SAMPLE = (
    """The quick brown fox doesn't jump over 12345 lazy dogs; it'll wait. I'm sure they've seen
that before, and we're here with 3.14159 apples!  Two  spaces, tabs\t\tand\n\n\nlines.
def f(x):\n    return x ** 2 + 1  # a comment\n
小狐狸跳过了懒狗。今天的天气很好，我们去公园散步吧！人工智能正在改变世界，2024年是重要的一年。
猫和狗在花园里玩，太阳很大，花很红。😀😀👍🏽👩‍👩‍👧 Straße, naïve café, Привет мир, שלום, مرحبا
"""
    * 4
)


def hf_json(tokens, added) -> dict:
    """A tokenizer.json in which every way to make a token of two others is a merge, by rank."""
    char = {t: "".join(BYTE_TO_CHAR[b] for b in t) for t in tokens}
    merges = []
    for token in tokens[256:]:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [[char[a], char[b]] for a, b in cuts if a in char and b in char]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id_, "content": name, "special": special, **flags}
            for name, (id_, special) in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {char[t]: i for i, t in enumerate(tokens)},
            "merges": merges,
        },
    }


@pytest.fixture(scope="session")
def small_tokens():
    return train_bpe([SAMPLE], 500)


@pytest.fixture(scope="session")
def small(small_tokens):
    return Tokenizer(small_tokens, specials="hf")


@pytest.fixture(scope="session")
def small_json(small_tokens):
    return hf_json(small_tokens, {n: (i, True) for n, i in special_ids("hf", 500).items()})


@pytest.fixture(scope="session")
def hf(small_json):
    return tokenizers.Tokenizer.from_str(json.dumps(small_json))


# Characters that this Python knows: newer ones are letters to one regex library and not to another.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
FRAGMENTS = st.sampled_from(
    [
        *[
            "the",
            " quick",
            "狐狸",
            "😀",
            "👩\u200d👩\u200d👧",
            "é",
            "e\u0301",
            "，",
            "。",
            "_",
            "12345",
            "٣",
        ],
        *["'s", "'LL", "'ſ", "!!", "...\n", "<|eot_id|>", "\n", "\r\n", "\t", "  ", "\u3000"],
    ]
)
MIXED = st.lists(st.one_of(FRAGMENTS, st.text(CHARACTERS, max_size=3))).map("".join)
TEXTS = st.one_of(st.text(CHARACTERS), MIXED)
WORDS = st.tuples(
    st.sampled_from(["a", "the", "狐狸", "12", "1234", "_x", "é"]),
    st.sampled_from([" ", "，", " \n \n", "\n  ", "! ", "。\r\n", "  \t ", " '"]),
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example(SAMPLE)
@example("<|begin_of_text|>a<|eot_id|><|reserved_special_token_247|> b")
def test_same_ids_as_hugging_face(small, hf, text):
    theirs = hf.encode(text, add_special_tokens=False).ids
    assert small.encode(text, allowed_special="all") == theirs
    assert small.decode(small.encode(text)) == text


def test_both_files_give_the_same_tokenizer(tmp_path, small_tokens, small_json):
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens))
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json))
    meta = Tokenizer.from_file(tmp_path / "tokenizer.model", specials="hf")
    json_ = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert meta.id_to_bytes == json_.id_to_bytes and meta.specials == json_.specials
    assert meta.encode(SAMPLE) == json_.encode(SAMPLE)
    named = Tokenizer.from_file(tmp_path / "tokenizer.json", specials="3.1")
    assert named.specials == special_ids("3.1", 500)


def test_added_tokens_of_a_json(tmp_path, small_tokens):
    added = {n: (i, True) for n, i in special_ids("hf", 500).items()}
    added |= {"<|tool|>": (756, True), "狐狸精": (757, False), "狐狸": (758, False)}
    data = hf_json(small_tokens, added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    text = "a狐狸精 and 狐狸<|tool|>"
    assert ours.vocab_size == 759
    assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    assert 756 not in ours.encode(text) and {757, 758} < set(ours.encode(text))
    assert ours.decode(ours.encode(text, allowed_special="all")) == text
    assert ours.decode([756, 757], skip_special=True) == "狐狸精"
    with pytest.raises(TokenizerError, match="cannot hold"):
        ours.save(tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_added_tokens_that_the_json_lists_twice(tmp_path, small_json):
    listed = json.loads(json.dumps(small_json))
    listed["model"]["vocab"] |= {t["content"]: t["id"] for t in listed["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(listed))
    assert Tokenizer.from_pretrained(tmp_path).n_ranks == 500


# --- Special tokens in text.


def test_text_does_not_become_a_control_token(golden):
    text = "a<|eot_id|>b"
    assert not golden.stop_ids & set(golden.encode(text))
    assert golden.encode("<|eot_id|>", allowed_special="all") == [128009]
    only = golden.encode("<|eot_id|><|eom_id|>", allowed_special={"<|eot_id|>"})
    assert only[0] == 128009 and golden.eom_id not in only
    assert golden.decode(only) == "<|eot_id|><|eom_id|>"


def test_refused_and_unknown_specials(golden):
    text = "x<|eot_id|>"
    with pytest.raises(TokenizerError, match="eot_id"):
        golden.encode(text, disallowed_special="all")
    with pytest.raises(TokenizerError, match="eot_id"):
        golden.encode(text, disallowed_special={"<|eot_id|>"})
    allowed = golden.encode(text, allowed_special={"<|eot_id|>"}, disallowed_special="all")
    assert allowed[-1] == 128009
    assert golden.encode(text, disallowed_special={"<|eom_id|>"}) == golden.encode(text)
    for argument in ("allowed_special", "disallowed_special"):
        with pytest.raises(TokenizerError, match=f"{argument}.*eot_idd"):
            golden.encode(text, **{argument: {"<|eot_idd|>"}})


@pytest.mark.parametrize("bad", [None, b"bytes", 3, ["text"]])
def test_text_must_be_a_str(small, bad):
    with pytest.raises(TokenizerError, match=type(bad).__name__):
        small.encode(bad)


def test_lone_surrogates_are_refused(small):
    with pytest.raises(TokenizerError, match=r"character 2 .*U\+D83D"):
        small.encode("ab\ud83d")


# --- Length limits.


def uncut(tokenizer: Tokenizer) -> tiktoken.Encoding:
    ranks = {t: i for i, t in enumerate(tokenizer.id_to_bytes[: tokenizer.n_ranks])}
    return tiktoken.Encoding("o", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


LONG = {
    "english": " ".join(random.Random(0).choices(SAMPLE.split(), k=150_000)),
    "chinese without spaces": "".join(random.Random(1).choices("小狐狸跳过了，懒狗。", k=90_000)),
    "digits": "3." + "1415926535" * 2_499,  # one run, of just under 25,000 characters ...
    "digits and a comma": "7," * 40_000,  # ... and one above it
    "lines": "  \n    x = 1\n\n" * 40_000,
}


@pytest.mark.parametrize("name", LONG)
def test_limits_leave_long_text_as_it_is(small, name):
    assert small.encode(LONG[name]) == uncut(small).encode_ordinary(LONG[name])


def test_limits_do_not_cut_a_special_token(small):
    text = "a" * 24_995 + "<|eot_id|>" + "b" * 10
    ids = small.encode(text, allowed_special="all")
    assert ids.count(small.eot_id) == 1 and small.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", "\n", " ", "狐", "7", "!", " \n"])
def test_endless_runs_are_cut_at_the_limit(small, unit):
    text = unit * 60_000
    cuts = list(tokenizer_module.slices(text))
    assert "".join(cuts) == text
    assert max(map(len, cuts)) <= 25_000
    assert small.decode(small.encode(text)) == text


def test_a_run_that_would_overflow_the_regex_stack(small):
    """tiktoken alone panics here."""
    assert small.decode(small.encode(" " * 2_000_000)) == " " * 2_000_000


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_slices_respect_both_limits(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_SLICE", 8)
        patch.setattr(tokenizer_module, "MAX_RUN", 5)
        slices = list(tokenizer_module.slices(text))
    assert "".join(slices) == text
    for part in slices:
        assert 0 < len(part) <= 8 and not re.search(r"\s{6}|\S{6}", part)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS))
def test_cuts_at_sure_places_change_nothing(words):
    """A word's end is such a place, and every word with what follows it fits into the limits."""
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_SLICE", 20)
        patch.setattr(tokenizer_module, "MAX_RUN", 12)
        slices = list(tokenizer_module.slices(text))
    assert len(slices) > 1 or len(text) <= 20
    assert [p for part in slices for p in PIECES.findall(part)] == PIECES.findall(text)


# --- Decoding.


@pytest.mark.parametrize("bad", [-1, 756, 2**70, "5", 1.0, None])
def test_ids_must_be_in_range(small, bad):
    for decode in (lambda: small.decode([0, bad]), lambda: StreamDecoder(small).push(bad)):
        with pytest.raises(TokenizerError, match=re.escape(str(bad))):
            decode()


def test_decode_takes_sequences(small):
    ids = small.encode("狐狸 fox", bos=True)
    assert small.decode(np.array(ids)) == small.decode(tuple(ids)) == "<|begin_of_text|>狐狸 fox"
    assert small.decode(ids, skip_special=True) == "狐狸 fox"
    assert small.decode([]) == "" and small.decode_bytes(ids[1:]) == "狐狸 fox".encode()
    with pytest.raises(TokenizerError, match="sequence"):
        small.decode(5)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 755)), skip=st.booleans())
def test_a_stream_of_any_ids_is_what_decode_gives(small, ids, skip):
    stream = StreamDecoder(small, skip_special=skip)
    text = "".join(stream.push(i) for i in ids) + stream.flush()
    assert text == small.decode(ids, skip_special=skip)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("猫😀👩‍👩‍👧é")
def test_a_stream_never_splits_a_character(text):
    by_bytes = Tokenizer(BYTES)
    stream, seen = StreamDecoder(by_bytes), ""
    for id_ in by_bytes.encode(text):
        seen += stream.push(id_)
        assert text.startswith(seen)
    assert seen == text and stream.flush() == ""


def test_a_stream_reports_what_is_left_and_starts_anew():
    by_bytes = Tokenizer(BYTES)
    stream = StreamDecoder(by_bytes)
    first, second, third = by_bytes.encode("猫")
    assert [stream.push(first), stream.push(second), stream.flush()] == ["", "", "\ufffd"]
    assert [stream.push(i) for i in (first, second, third)] == ["", "", "猫"]
    special = by_bytes.eot_id
    assert stream.push(first) == "" and stream.push(special) == "\ufffd<|eot_id|>"
    skipping = StreamDecoder(by_bytes, skip_special=True)
    assert [skipping.push(i) for i in (first, special, second, third)] == ["", "", "", "猫"]


# --- Files: saving, and what is refused.


def test_save_and_load(tmp_path, small):
    path = tmp_path / "tokenizer.model"
    small.save(path)
    again = Tokenizer.from_file(path, specials="hf")
    assert path.read_bytes() == rank_lines(small.id_to_bytes[:500])
    assert again.id_to_bytes == small.id_to_bytes and again.encode(SAMPLE) == small.encode(SAMPLE)


def test_a_failed_save_leaves_the_old_file(tmp_path, small, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_text("old")

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(TokenizerError, match="No space left"):
        small.save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_pickle(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.encode(SAMPLE, bos=True) == small.encode(SAMPLE, bos=True)


GOOD = rank_lines([*BYTES, b"aa", b"bb"]).splitlines(keepends=True)
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"".join(GOOD[:200]), "56 of the 256 single bytes"),
        (b"".join(GOOD[:100] + GOOD[101:]), "line 101 has rank 101 where 100 is due"),
        (b"".join(GOOD + GOOD[-1:]), "line 259 has rank 257 where 258 is due"),
        (b"".join(GOOD) + b"YWE= 258\n", "line 259 repeats the token of line 257"),
        (b"".join(GOOD)[:-2], "line 258 has rank 25 where"),
        (b"".join(GOOD)[:-6], "line 258 is not"),
        (b"".join(GOOD) + b"Y*W= 258\n", "line 259 is not"),
        (b"".join(GOOD) + b"YWF 258\n", "line 259 is not"),
        (b"".join(GOOD) + b"YWFh x\n", "line 259 is not"),
        (SENTENCEPIECE, "sentencepiece"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b'{"model": {"vocab"', "invalid JSON.*get a complete file"),
        (b'{"model": {}}', "not a byte-level BPE"),
        (b'{"a": "\xff"}', "invalid JSON"),
    ],
)
def test_bad_files_are_named_with_their_remedy(tmp_path, data, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.from_file(path)
    assert str(path) in str(error.value)


def edit(data, path, value):
    *way, last = path
    for key in way:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


SPLIT = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (SPLIT, r"\w+", "splits or normalizes"),
        (("normalizer",), {"type": "NFC"}, "splits or normalizes"),
        (("pre_tokenizer",), None, "not a byte-level BPE"),
        (("model", "vocab"), [["a", 0]], "not a byte-level BPE"),
        (("model", "vocab", "!"), None, "no token has the id 0"),
        (("model", "vocab", "!"), 1, "same id"),
        (("model", "vocab", "!"), "0", "not a byte-level BPE"),
        (("model", "vocab", "狐"), 500, "'狐'.*stands for no byte"),
        (("added_tokens", 0), None, "gaps"),
        (("added_tokens", 20), None, "gaps"),
        (("added_tokens", 20, "id"), 10**12, "gaps"),
        (("added_tokens", 20, "id"), -1, "gaps"),
        (("added_tokens", 20, "id"), 521, "same name or id"),
        (("added_tokens", 20, "lstrip"), True, "lstrip"),
    ],
)
def test_bad_tokenizer_json(tmp_path, small_json, path, value, message):
    data = json.loads(json.dumps(small_json))
    edit(data, path, value)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.from_file(file)
    assert str(file) in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.model"):
        with pytest.raises(TokenizerError, match="cannot be read"):
            Tokenizer.from_file(path)
    with pytest.raises(TokenizerError, match=r"'3\.2' is unknown"):
        Tokenizer(BYTES, specials="3.2")
    with pytest.raises(TokenizerError, match="are equal"):
        Tokenizer([*BYTES, b"a"])


def test_from_pretrained_finds_the_file(tmp_path, small_tokens, small_json):
    with pytest.raises(TokenizerError, match="neither"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens))
    assert Tokenizer.from_pretrained(tmp_path).specials == special_ids("3.1", 500)
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json))
    assert Tokenizer.from_pretrained(tmp_path).specials == special_ids("hf", 500)
    (tmp_path / "tokenizer.model").unlink()
    assert Tokenizer.from_pretrained(tmp_path).specials == special_ids("hf", 500)
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens))
    for absent in (tmp_path / "absent", tmp_path / "tokenizer.model"):
        with pytest.raises(TokenizerError, match="not a folder"):
            Tokenizer.from_pretrained(absent)


@pytest.mark.parametrize(
    ("params", "table"),
    [
        ({"use_scaled_rope": True, "vocab_size": 756}, "3.1"),
        ({"use_scaled_rope": False, "vocab_size": 768}, "3.0"),  # rows padded to a multiple of 64
        ({"vocab_size": -1}, "3.0"),
    ],
)
def test_params_json_says_which_specials(tmp_path, small_tokens, params, table):
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens))
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert Tokenizer.from_pretrained(tmp_path).specials == special_ids(table, 500)
    chosen = Tokenizer.from_pretrained(tmp_path, specials="hf")
    assert chosen.specials == special_ids("hf", 500)


def test_tokenizer_config_says_which_specials(tmp_path, small_tokens):
    """Where Hugging Face's settings stand beside Meta's file."""
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens))
    path = tmp_path / "tokenizer_config.json"
    for table in ("3.0", "3.1", "hf"):
        ids = special_ids(table, 500)
        listed = {str(i): {"content": name, "special": True} for name, i in ids.items()}
        path.write_text(json.dumps({"added_tokens_decoder": listed}))
        assert Tokenizer.from_pretrained(tmp_path).specials == ids
    assert Tokenizer.from_pretrained(tmp_path, specials="3.0").specials == special_ids("3.0", 500)
    path.write_text("{}")
    assert Tokenizer.from_pretrained(tmp_path).specials == special_ids("3.1", 500)
    for wrong, says in (
        ('{"added_tokens_decoder": {"a": {"content": "b", "special": true}}}', "by their ids"),
        ('{"added_tokens_decoder": [1]}', "by their ids"),
        ("{", "invalid JSON"),
    ):
        path.write_text(wrong)
        with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: .*{says}"):
            Tokenizer.from_pretrained(tmp_path)


def test_params_json_that_contradicts(tmp_path, small_tokens):
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(small_tokens[:400]))
    (tmp_path / "params.json").write_text('{"vocab_size": 756}')
    with pytest.raises(TokenizerError, match=r"656 tokens.*756.*cut off"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"params\.json: invalid JSON"):
        Tokenizer.from_pretrained(tmp_path)
