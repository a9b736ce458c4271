"""The texts of a corpus, one after another, for what needs no ids: large files are never whole in
memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tokenizer.tokenizer import MAX_SLICE, slices
from .formats import Completion, Dialog, Document, Preference, Row, parsed
from .rows import TEXT_FILES, Raw, data_files, raw_rows

BLOCK = 2**20  # bytes read at a time
MAX_WHOLE = 64 * 2**20  # bytes of a JSON file that may be one array


def read_texts(paths: Any) -> Iterator[str]:
    """Yields the texts of files and of folders of files: of a text file its lines, some 400,000
    characters at a time and cut where the tokenizer's pattern cuts anyway; of JSON files each
    document, prompt, answer and message.

    Raises DataError (file, line) for a file that is missing, empty, binary, of another encoding
    than UTF-8, or of an unknown kind, and for a row that is of no known format.
    """
    for path in data_files(paths):
        try:
            if path.suffix.lower() in TEXT_FILES:
                yield from _text(path)
            else:
                yield from _json(path)
        except OSError as error:
            raise DataError(f"the file cannot be read ({error.strerror})", path) from error


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    waiting, line, empty = "", 1, True
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            if b"\0" in block:
                at = line + block.count(b"\n", 0, block.index(b"\0"))
                raise DataError("it holds a byte 0: the file is binary, or UTF-16", path, at)
            try:
                waiting += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder counts from what it kept of the block before, at most three bytes.
                at = line + error.object.count(b"\n", 0, error.start)
                byte = error.object[error.start]
                raise DataError(
                    f"byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8", path, at
                ) from None
            line += block.count(b"\n")
            empty = empty and not waiting.strip()
            if not block:
                break
            if len(waiting) > 2 * MAX_SLICE:
                *whole, waiting = slices(waiting)
                yield from whole
    if empty:
        raise DataError("the file is empty; give one with text, or leave it out", path)
    if waiting:
        yield waiting


def _json(path: Path) -> Iterator[str]:
    for _, row in parsed(path, _rows(path)):
        yield from _texts_of(row)


def _rows(path: Path) -> Iterator[Raw]:
    if path.stat().st_size <= MAX_WHOLE:
        yield from raw_rows(path, path.read_bytes())
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip()[:1] == b"[":
                yield Raw(1, fault=f"a JSON array of more than {MAX_WHOLE >> 20} MB; write one row "
                          "a line")  # fmt: skip
                return
            if line.strip():
                yield from (raw._replace(line=number) for raw in raw_rows(path, line))


def _texts_of(row: Row) -> Iterator[str]:
    if isinstance(row, Document):
        yield row.text
    elif isinstance(row, Completion):
        yield row.prompt
        yield row.completion
    elif isinstance(row, Dialog):
        yield from (message.content for message in row.messages if message.content)
    elif isinstance(row, Preference):
        yield from _texts_of(row.chosen)
        yield from _texts_of(row.rejected)
