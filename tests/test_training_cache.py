"""The cache of encoded files: it saves tokenising, and is never wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from llama_fast.errors import DataError, PromptError
from llama_fast.tokenizer import ChatFormat, Tokenizer
from llama_fast.training import read

from .test_chat import demo  # noqa: F401  a fixture
from .training_rows import MIXED, dialog, write


def counted(monkeypatch) -> list[str]:
    """The texts that a tokenizer encodes from now on."""
    seen = []
    encode = Tokenizer.encode_words
    monkeypatch.setattr(
        Tokenizer,
        "encode_words",
        lambda self, text, words: seen.append(text) or encode(self, text, words),
    )
    return seen


def same(a, b) -> bool:
    first, second = (data.batch(range(len(data))) for data in (a, b))
    return all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))


def test_a_second_read_does_not_tokenise_again(demo, tmp_path, monkeypatch):  # noqa: F811
    for n in range(3):
        write(tmp_path, f"{n}.jsonl", [MIXED, dialog(f"é{n}")])
    (tmp_path / "t.txt").write_text("Once upon a time. " * 20)
    cache = tmp_path / "cache"
    first = read(tmp_path, demo, cache=cache, block=500)
    assert first.report.cached == 0 and len(list(cache.iterdir())) == 4
    seen = counted(monkeypatch)
    second = read(tmp_path, demo, cache=cache, block=500)
    assert second.report.cached == 4 and not seen
    assert same(first, second) and second.fingerprint() == first.fingerprint()
    assert "4 from the cache" in str(second.report)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert all(str(entry) in maps.read_text() for entry in cache.iterdir())
    # Ids are kept before they are packed: another block needs no new ones.
    assert same(
        read(tmp_path, demo, cache=cache, block=400), read(tmp_path, demo, cache=None, block=400)
    )
    seen.clear()
    read(tmp_path, demo, cache=cache, block=400)
    assert not seen
    # One file more is one entry more.
    write(tmp_path, "4.jsonl", [dialog("new")])
    assert read(tmp_path, demo, cache=cache, block=500).report.cached == 4


def test_more_files_than_can_be_open(demo, tmp_path):  # noqa: F811
    for n in range(40):
        write(tmp_path, f"{n}.jsonl", [dialog(f"q{n}")])
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    read(tmp_path, demo, cache=tmp_path / "cache")
    open_now = max(int(name) for name in os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 10, before[1]))
        data = read(tmp_path, demo, cache=tmp_path / "cache")
        assert data.report.cached == 40 and data.batch(range(len(data))).kept > 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_entry_is_of_all_that_it_follows_from(demo, tmp_path):  # noqa: F811
    path, cache = write(tmp_path, "a.jsonl", [MIXED]), tmp_path / "cache"
    read(path, demo, cache=cache)
    for change in (
        {"train_on": "last"},
        {"chat": ChatFormat(demo, "3.1", date="1 Jan 2025")},
        {"tokenizer": Tokenizer(demo.id_to_bytes[: demo.n_ranks], specials="hf")},
    ):
        given_ = {"tokenizer": demo, **change}
        found = read(path, cache=cache, **given_)
        assert found.report.cached == 0
        assert same(found, read(path, **given_))
        assert read(path, cache=cache, **given_).report.cached == 1
    path.write_text(path.read_text().replace("first", "other"))
    assert read(path, demo, cache=cache).report.cached == 0
    # The same content under another name is the same entry, and its faults name the new file.
    moved = path.rename(tmp_path / "b.jsonl")
    assert read(moved, demo, cache=cache).report.cached == 1


def test_a_chat_format_is_made_for_dialogs_alone(demo, tmp_path):  # noqa: F811
    made = []

    def chat():
        made.append(1)
        return ChatFormat(demo, "3.1")

    cache = tmp_path / "cache"
    text = write(tmp_path, "text.jsonl", [{"text": "Once."}, {"prompt": "a", "completion": "b"}])
    counts = [
        read(text, demo, chat=given_, cache=cache).report.cached
        for given_ in (chat, None, ChatFormat(demo, "3.0"))
    ]
    assert not made and counts == [0, 1, 1] and len(list(cache.iterdir())) == 1
    dialogs = [write(tmp_path, f"{n}.jsonl", [{"text": "Once."}, dialog(f"{n}")]) for n in (1, 2)]
    found = read([text, *dialogs], demo, chat=chat, cache=cache)
    assert made == [1] and found.report.cached == 1 and found.report.rows == 6
    assert same(found, read([text, *dialogs], demo, chat=ChatFormat(demo, "3.1")))
    assert read([text, *dialogs], demo, chat=chat, cache=cache).report.cached == 3


def test_dialogs_left_out_for_want_of_a_format_come_with_one(demo, tmp_path):  # noqa: F811
    path, cache = write(tmp_path, "a.jsonl", [{"text": "Once."}, dialog()]), tmp_path / "cache"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2.*no chat format"):
        read(path, demo, chat=lambda: None, cache=cache)
    skipped = read(path, demo, chat=lambda: None, cache=cache, on_error="skip")
    assert sum(skipped.report.dropped.values()) == 1
    assert read(path, demo, chat=lambda: None, cache=cache, on_error="skip").report.cached == 1
    found = read(path, demo, cache=cache, on_error="skip")
    assert found.report.cached == 0 and not found.report.dropped


def test_a_format_that_cannot_be_made_is_said_as_it_is(demo, tmp_path):  # noqa: F811
    def chat():
        raise PromptError("the template is no template")

    path = write(tmp_path, "a.jsonl", [dialog()])
    with pytest.raises(PromptError, match="the template is no template"):
        read(path, demo, chat=chat, on_error="skip")


def test_damaged_entries_are_made_anew(demo, tmp_path):  # noqa: F811
    path, cache = write(tmp_path, "a.jsonl", [MIXED] * 3), tmp_path / "cache"
    wanted = read(path, demo)
    read(path, demo, cache=cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damage in (b"", b"\2" + b"\0" * 7 + b"[]", b"\1" + b"\0" * 7 + b"5",
                   whole[:7], whole[:40], whole[:-4], bytes(flipped), b"\xff" * 200,
                   whole.replace(b'"I32"', b'"F32"'),
                   whole.replace(b"__metadata__", b"__metaxxxx__")):  # fmt: skip
        entry.write_bytes(damage)
        found = read(path, demo, cache=cache)
        assert found.report.cached == 0 and same(found, wanted)
        assert read(path, demo, cache=cache).report.cached == 1
    assert [p.name for p in cache.iterdir()] == [entry.name]


def test_a_full_disk_is_said_and_leaves_nothing(demo, tmp_path):  # noqa: F811
    """The kernel refuses to let files grow past a limit, as a full disk refuses all writes."""
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    path, cache = write(tmp_path, "a.jsonl", [MIXED]), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(DataError, match=r"cannot be written.*File too large"):
            read(path, demo, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(cache.iterdir())


def test_faults_are_kept_in_the_cache(demo, tmp_path):  # noqa: F811
    path, cache = write(tmp_path, "a.jsonl", [dialog(), "{", dialog()]), tmp_path / "cache"
    with pytest.raises(DataError, match="line 2"):
        read(path, demo, cache=cache)
    assert not cache.exists()
    first = read(path, demo, cache=cache, on_error="skip")
    second = read(path, demo, cache=cache, on_error="skip")
    assert second.report.cached == 1 and second.report.dropped == first.report.dropped
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the line is no JSON"):
        read(path, demo, cache=cache)


def test_megabytes_are_read_within_seconds(demo, tmp_path):  # noqa: F811
    text = "Once upon a time there was a small dog who ran home. 从前有一只小狗。\n"
    path = tmp_path / "a.txt"
    path.write_text(text * (1_000_000 // len(text.encode())))
    started = time.process_time()
    read(path, demo, cache=tmp_path / "cache")
    first = time.process_time() - started
    started = time.process_time()
    assert read(path, demo, cache=tmp_path / "cache").report.cached == 1
    second = time.process_time() - started
    # 5 MB within seconds, on a machine of any age; and from the cache nothing is encoded.
    assert first < 6 and second < first / 3
