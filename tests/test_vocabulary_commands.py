"""`llama-fast vocab`, the reader of its corpora, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_fast.errors import DataError, TokenizerError
from llama_fast.tokenizer import Tokenizer, vocabulary_report
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.training import texts as corpus_texts
from llama_fast.training.texts import read_texts

DEMO = Path(__file__).parent.parent / "llama_fast" / "demo"
CHINESE = "有中文字幕的电影，没有文字幕的电影。\n我们去山上看月亮，你好世界！\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_text(CHINESE * 6 + "the cat sat\n", encoding="utf-8")
    return tmp_path / "corpus.txt"


# --- the reader


def test_texts_of_every_kind_of_file(tmp_path, corpus):
    rows = [
        {"text": "a text"},
        {"instruction": "ask", "output": "answer"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"prompt": "p", "completion": "c"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = ["a text", "ask", "answer", "hi", "ho", "p", "c", "q", "good", "q", "bad"]
    assert list(read_texts(tmp_path / "rows.jsonl")) == expected
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    assert list(read_texts([tmp_path])) == [corpus.read_text(), "a text", *expected]


def test_large_files_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_texts, "BLOCK", 1009)  # borders within characters
    monkeypatch.setattr(corpus_texts, "MAX_SLICE", 200)
    lines = "".join(f"行{n}，猫和狗。\n\n" for n in range(400))
    (tmp_path / "a.txt").write_text("\ufeff" + lines, encoding="utf-8")
    parts = list(read_texts(tmp_path))
    assert "".join(parts) == lines
    monkeypatch.setattr(corpus_texts, "MAX_WHOLE", 10)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"no": 1}\n')
    found = read_texts(tmp_path / "b.jsonl")
    assert [next(found), next(found)] == ["one", "two"]
    with pytest.raises(DataError, match="line 4: the keys no"):
        next(found)
    (tmp_path / "b.jsonl").write_text('[{"text": "one"}]')
    with pytest.raises(DataError, match="JSON array of more than"):
        list(read_texts(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        ("一\n二\n".encode("gbk"), "line 2: byte 0xb6 is not UTF-8"),
        ("好\n".encode() + b"\xff", "line 2: byte 0xff is not UTF-8"),
        ("好".encode()[:2], "not UTF-8"),
        ("text".encode("utf-16"), "binary, or UTF-16|not UTF-8"),
        (b"\n\nab\0cd", "line 3: it holds a byte 0"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / "a.txt"))


# --- the report


def test_measured_by_hand():
    singles, han = [bytes([b]) for b in BYTE_ORDER], "你".encode()
    more = [han[:2], han, b" t", b" th", b" the"]
    tokenizer = Tokenizer([*singles, *more], specials={})
    found = vocabulary_report.measure(tokenizer, ["你好 the1\n\nб", ""])
    assert (found.texts, found.lines, found.used) == (2, 2, 9)
    han, latin, other = (found.by_script[name] for name in ("Han", "Latin", "other"))
    assert (han.tokens, han.nbytes, han.characters, han.fallback) == (4, 6, 2, 3)
    assert (latin.tokens, latin.nbytes, latin.characters, latin.fallback) == (1, 4, 4, 0)
    assert (other.tokens, found.by_script["Cyrillic"].tokens) == (3, 2)
    assert found.all.tokens == 10 and found.all.nbytes == len("你好 the1\n\nб".encode())
    assert found.all.characters == 10 and found.longest[0] == (" the", 1)
    assert found.tokens_per_line == 5 and found.all.fallback_share == 0.5
    with pytest.raises(TokenizerError, match="no text"):
        vocabulary_report.measure(tokenizer, [""])


# --- the commands


def test_train_extend_generate_report_prune(run, corpus, tmp_path):
    longer, model, small = (tmp_path / name for name in ("longer", "model", "small"))
    train = ("vocab", "train", corpus, "--tokens", 12, "--chars-only", "Han", "--max-chars", 4)
    code, out, err = run(*train, "--out", longer)
    assert code == 0 and "12 new tokens" in err and " + " in out
    old, new = Tokenizer.from_pretrained(DEMO), Tokenizer.from_pretrained(longer)
    assert new.vocab_size == old.vocab_size + 12
    assert len(new.encode(CHINESE)) < len(old.encode(CHINESE))
    assert all(len(new.id_to_bytes[id_].decode(errors="ignore")) <= 4 for id_ in range(2304, 2316))

    code, _, err = run(
        *("vocab", "extend", DEMO, longer, "--out", model, "--init", "distill"),
        *("--texts", corpus, "--snippets", 4),
    )
    assert code == 0 and "distilled" in err and "12 new tokens" in err, err
    code, out, _ = run("generate", "我们去", "--model", model, "-n", 5, "--temperature", 0, "-q")
    assert code == 0 and out.strip()
    assert (
        run("vocab", "extend", DEMO, longer / "tokenizer.json", "--out", tmp_path / "mean")[0] == 0
    )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "mean")]
    assert weights[0] != weights[1]

    json_file, png = tmp_path / "fit.json", tmp_path / "fit.png"
    code, out, err = run(
        *("vocab", "report", DEMO, longer, corpus, "--json", json_file, "--plot", png)
    )
    assert code == 0 and "× the tokens of the first" in out and "Han" in out, err
    figures = json.loads(json_file.read_text())
    assert figures["longer"]["all"]["tokens"] < figures["demo"]["all"]["tokens"]
    assert png.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("vocab", "report", DEMO / "tokenizer.model", corpus)
    assert code == 0 and "Longest tokens of tokenizer.model" in out

    code, _, err = run("vocab", "prune", model, corpus, "--out", small)
    assert code == 0 and "kept" in err and "checked 8 texts" in err, err
    assert Tokenizer.from_pretrained(small).vocab_size < 1200
    assert run("generate", "我们去", "--model", small, "-n", 5, "--temperature", 0, "-q")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "CORPUS", "--tokens", "90000", "--out", "NEW"], 1, "not 90000: ask for fewer"),
        (["train", "CORPUS", "--out", "CORPUS"], 1, "is a file"),
        (["train", "missing.txt", "--out", "NEW"], 1, "no such file"),
        (["train", "CORPUS", "--chars-only", "Elvish", "--out", "NEW"], 1, "no Unicode script"),
        (["train", "CORPUS", "--tokens", "0", "--out", "NEW"], 2, "write 1 or more"),
        (["extend", "DEMO", "DEMO", "--out", "NEW"], 1, "nothing to extend"),
        (["extend", "DEMO", "DEMO", "--out", "NEW", "--init", "distill"], 2, "--texts CORPUS"),
        (["extend", "DEMO", "DEMO", "--out", "NEW", "--texts", "CORPUS"], 2, "--init distill"),
        (["extend", "missing", "DEMO", "--out", "NEW"], 1, "missing does not exist"),
        (["prune", "DEMO", "missing.txt", "--out", "NEW"], 1, "no such file"),
        (["report", "DEMO"], 2, "no texts are given"),
        (["report", "missing", "CORPUS"], 1, "cannot be read"),
    ],
)
def test_errors_of_one_line(run, corpus, tmp_path, arguments, code, message):
    places = {"CORPUS": corpus, "DEMO": DEMO, "NEW": tmp_path / "new"}
    got, _, err = run("vocab", *(places.get(word, word) for word in arguments))
    assert (got, message in err) == (code, True), err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt"}, "nothing half-written"
