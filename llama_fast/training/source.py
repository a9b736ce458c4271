"""One data file as ids: encoded once, kept in a folder, and mapped into memory from there.

An entry is named by all that it follows from: the file's content, the tokenizer, the masking, the
version of this code and, if there is a dialog in the file, the chat format with its date. It is
whole or it is not there (written beside and renamed), and one that is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import JSON_ERRORS, DataError, PromptError, TokenizerError
from ..tokenizer import Tokenizer
from ..utils.files import atomic_file
from .formats import parse_row
from .masks import Chat, ChatOrMaker, examples, has_dialog
from .rows import raw_rows

VERSION = "data-2"
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


@dataclass(frozen=True)
class Source:
    """A file's documents, laid end to end.

    ids: (n,) int32. bits: the mask of the ids, eight in a byte. borders: (D+1,) int64, document d
    is ids[borders[d]:borders[d+1]]. lines: (D,) int64, where each stands in the file. may_be_cut:
    (D,) uint8. faults: line and reason of each row that was left out. key: names the entry.
    """

    path: Path
    key: str
    ids: np.ndarray
    bits: np.ndarray
    borders: np.ndarray
    lines: np.ndarray
    may_be_cut: np.ndarray
    faults: tuple[tuple[int, str], ...] = ()

    def trained(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns how many of the ids starts[i] … ends[i]-1 are trained, for each i."""
        bits = np.unpackbits(self.bits, count=len(self.ids), bitorder="little")
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(bits, dtype=np.int64)])
        return before[ends] - before[starts]

    def mask(self, start: int, end: int) -> np.ndarray:
        """Returns the mask of ids start … end-1, as booleans."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-end // 8)], bitorder="little")
        return bits[start - 8 * first : end - 8 * first].astype(bool)


ARRAYS = ("ids", "bits", "borders", "lines", "may_be_cut")


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Returns a text that differs where the ids of any text could."""
    found = hashlib.blake2b(digest_size=16)
    for token in tokenizer.id_to_bytes:
        found.update(len(token).to_bytes(4, "little") + token)
    named = [sorted(tokenizer.specials.items()), sorted(tokenizer.added.items())]
    n_ranks = tokenizer.n_ranks, len(tokenizer.ranks)
    found.update(repr([*named, n_ranks, tokenizer.bos_id, tokenizer.eos_id]).encode())
    return found.hexdigest()


class DialogFound(Exception):
    """A file that was encoded without a chat format has a row that needs one."""


class Encoder:
    """Files to sources, by one tokenizer, chat format and masking (TRAIN_ON, PREFERENCES). The chat
    format is made and asked for when the first dialog comes: texts do without."""

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatOrMaker, train_on: str, cache: Path | None
    ) -> None:
        self.tokenizer, self.train_on, self.cache = tokenizer, train_on, cache
        self._chat = chat
        self.from_cache = 0  # files
        self._settings = repr([VERSION, fingerprint_of(tokenizer), train_on])

    @cached_property
    def chat(self) -> Chat | None:
        return self._chat() if callable(self._chat) else self._chat

    def source(self, path: Path, skip: bool, advance: Callable[[int], None]) -> Source:
        """Returns a file's source, from the cache if it is there.

        skip: leave rows with faults out; otherwise the first one raises DataError (file, line).
        advance: called with the bytes of the file that were done since the last call.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"the file cannot be read ({error.strerror})", path) from error
        done = 0

        def counted(count: int) -> None:
            nonlocal done
            done += count
            advance(count)

        try:
            found = self._source(path, data, False, skip, counted)
        except DialogFound:
            advance(-done)
            found = self._source(path, data, True, skip, advance)
        if found.faults and not skip:
            line, reason = found.faults[0]
            raise DataError(reason, path, line)
        return found

    def _source(
        self, path: Path, data: bytes, dialogs: bool, skip: bool, advance: Callable[[int], None]
    ) -> Source:
        """dialogs: whether the file has some. Raises DialogFound where it has against that."""
        key = self._key(path, data, dialogs)
        entry = None if self.cache is None else self.cache / f"{key}.safetensors"
        found = None if entry is None else _load(entry, path, key)
        if found is not None:
            self.from_cache += 1
            advance(len(data))
            return found
        found = self._encode(path, data, key, dialogs, skip, advance)
        if entry is not None:
            _save(entry, found)
            found = _load(entry, path, key) or found
        return found

    def _key(self, path: Path, data: bytes, dialogs: bool) -> str:
        of_chat = "texts alone"
        if dialogs:
            of_chat = "no chat format" if self.chat is None else self.chat.fingerprint()
        key = hashlib.blake2b(digest_size=16)
        # A suffix says how the content is read.
        key.update(f"{self._settings} {of_chat} {path.suffix.lower()}".encode())
        key.update(data)
        return key.hexdigest()

    def _encode(
        self,
        path: Path,
        data: bytes,
        key: str,
        dialogs: bool,
        skip: bool,
        advance: Callable[[int], None],
    ) -> Source:
        ids, mask = array("i"), bytearray()
        borders, lines, may_be_cut = array("q", [0]), array("q"), bytearray()
        faults: list[tuple[int, str]] = []
        n_lines, done = 1 + data.count(b"\n"), 0
        for raw in raw_rows(path, data):
            try:
                if raw.fault is not None:
                    raise DataError(raw.fault)
                row = parse_row(raw.value)
                if not dialogs and has_dialog(row):
                    raise DialogFound
                chat = self.chat if dialogs else None
                found = examples(row, self.tokenizer, chat, self.train_on)
            except (DataError, PromptError, TokenizerError) as error:
                if not skip:
                    raise DataError(str(error), path, raw.line) from None
                faults.append((raw.line, str(error)))
                continue
            for new in found:
                ids.extend(new.ids)
                mask.extend(new.mask)
                borders.append(len(ids))
                lines.append(raw.line)
                may_be_cut.append(new.may_be_cut)
            if (now := len(data) * raw.line // n_lines) > done + 50_000:
                advance(now - done)
                done = now
        advance(len(data) - done)
        return Source(
            path,
            key,
            np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32),
            np.packbits(np.frombuffer(mask, np.uint8), bitorder="little"),
            np.frombuffer(borders, np.int64),
            np.frombuffer(lines, np.int64) if lines else np.empty(0, np.int64),
            np.frombuffer(may_be_cut, np.uint8),
            tuple(faults),
        )


def _arrays(source: Source) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(getattr(source, name)) for name in ARRAYS}


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    found = 0
    for name in ARRAYS:
        found = zlib.crc32(arrays[name], found)
    return str(found)


def _save(entry: Path, source: Source) -> None:
    arrays = _arrays(source)
    about = {"key": source.key, "crc32": _checksum(arrays), "faults": json.dumps(source.faults)}
    try:
        with atomic_file(entry) as beside:
            save_file(arrays, beside, metadata=about)
    except (OSError, SafetensorError) as error:  # the latter of a full disk
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the cache cannot be written ({reason})", entry) from error


# What a damaged entry makes json, numpy and torch raise.
DAMAGED = (OSError, LookupError, TypeError, AttributeError, RuntimeError, *JSON_ERRORS)


def _load(entry: Path, path: Path, key: str) -> Source | None:
    """The source of an entry, its arrays mapped into memory; None for one that is not there or is
    damaged in whatever way."""
    try:
        with open(entry, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, entry.stat().st_size)))
        about = header.pop("__metadata__")
        data = _mapped(entry)[8 + length :]
        arrays = {name: _array(data, header[name]) for name in ARRAYS}
        faults = tuple((int(line), str(reason)) for line, reason in json.loads(about["faults"]))
        if about["key"] != key or about["crc32"] != _checksum(arrays):
            return None
    except DAMAGED:
        return None
    return Source(path, key, **arrays, faults=faults)


def _mapped(entry: Path) -> np.ndarray:
    """The bytes of a file, mapped by torch: numpy's maps keep the file open, and there may be more
    files than a process can have open."""
    size = entry.stat().st_size
    return torch.from_file(str(entry), False, size, dtype=torch.uint8, device="cpu").numpy()


def _array(data: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    dtype, (begin, end) = np.dtype(_DTYPES[tensor["dtype"]]), tensor["data_offsets"]
    (n,) = tensor["shape"]
    if n * dtype.itemsize != end - begin or not 0 <= begin <= end <= len(data):
        raise ValueError("the file is cut off")
    return data[begin:end].view(dtype)
