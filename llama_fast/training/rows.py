"""The rows of a data file, as they stand in it: JSON values, or a whole text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import JSON_ERRORS, DataError, json_fault

TEXT_FILES = (".txt", ".text", ".md")
JSON_FILES = (".json", ".jsonl", ".ndjson")
MAX_LINE = 64 * 2**20  # bytes of one line of JSON
_BOM = b"\xef\xbb\xbf"
_BLANKS = " \t\r\n"


class Raw(NamedTuple):
    """A row: its line (from 1), and its value or what is wrong with it."""

    line: int
    value: Any = None
    fault: str | None = None


def data_files(paths: Any) -> list[Path]:
    """Returns the files of one or several paths, of which folders give the data files below them,
    by name; .md files only where they are named, since a README is no data. Raises DataError for a
    path that does not exist, a folder without data files, and a file of another kind."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise DataError("no files of training data are given; give at least one")
    found: list[Path] = []
    kinds = ", ".join((*TEXT_FILES, *JSON_FILES))
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IN_FOLDERS)
            inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
            if not inside:
                raise DataError(f"the folder holds no data files ({kinds})", path)
            found += inside
        elif not path.is_file():
            raise DataError("there is no such file", path)
        elif path.suffix.lower() not in _KINDS:
            raise DataError(
                f"a file {path.suffix or 'without a suffix'} is unknown; give {kinds}", path
            )
        else:
            found.append(path)
    return found


_KINDS = (*TEXT_FILES, *JSON_FILES)
_IN_FOLDERS = [kind for kind in _KINDS if kind != ".md"]


def raw_rows(path: Path, data: bytes) -> Iterator[Raw]:
    """Yields the rows of a file's bytes: a text file is one row {"text"}; JSON is an array or one
    value a line, told by its first character. What is wrong with a row, or with the file, is
    yielded as a fault."""
    data = data.removeprefix(_BOM)
    if not data.strip():
        yield Raw(1, fault="the file is empty; give one with text, or leave it out")
    elif path.suffix.lower() in TEXT_FILES:
        yield _text(data)
    elif data.lstrip()[:1] == b"[":
        yield from _array(data)
    else:
        yield from _lines(data)


def _text(data: bytes) -> Raw:
    try:
        return Raw(1, {"text": data.decode()})
    except UnicodeDecodeError as error:
        return Raw(1 + data.count(b"\n", 0, error.start), fault=_no_utf8(error))


def _no_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8 text; "
        "save the file as UTF-8"
    )


def _lines(data: bytes) -> Iterator[Raw]:
    start = line = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line += 1
        row, start = data[start:end], end + 1
        if not row.strip():
            continue
        if len(row) > MAX_LINE:
            yield Raw(
                line, fault=f"the line has more than {MAX_LINE >> 20} MB; write one row a line"
            )
            continue
        try:
            yield Raw(line, json.loads(row))
        except JSON_ERRORS as error:
            if line == 1 and (whole := _object(data)) is not None:
                yield whole
                return
            yield Raw(line, fault=_no_json(error))


def _object(data: bytes) -> Raw | None:
    """A file that is one object over several lines, as a single row."""
    if len(data) > MAX_LINE:
        return None
    try:
        return Raw(1, json.loads(data))
    except JSON_ERRORS:
        return None


def _no_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _no_utf8(error)
    fault = json_fault(error)
    if isinstance(error, json.JSONDecodeError) and fault.startswith("it breaks"):
        fault = f"it breaks at character {error.pos + 1}"
    return f"the line is no JSON ({fault}); write one object a line"


def _array(data: bytes) -> Iterator[Raw]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        # Without its characters no row of an array can be told from the next.
        yield Raw(1 + data.count(b"\n", 0, error.start), fault=_no_utf8(error))
        return
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                yield Raw(line, fault="text follows the end of the JSON array; remove it")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except JSON_ERRORS as error:
            yield Raw(line, fault=f"the JSON array is broken here ({json_fault(error)})")
            return
        yield Raw(line, value)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            yield Raw(
                line, fault='the JSON array lacks "," or its end "]" here; the file may be cut'
            )
            return


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at
