"""Files of training data become packed rows: `read` and what it returns.

    data = read(["dialogs.jsonl", "books/"], tokenizer, block=2048)
    print(data.report); print(data.show(3))
    batch = data.batch(data.order(seed=0, epoch=0)[:8])

Facts of the formats, masks and packing: docs/training.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, PromptError
from ..tokenizer import ChatFormat, Tokenizer
from .masks import TRAIN_ON, ChatOrMaker
from .packing import best_fit, cut, shuffled
from .progress import ReadingProgress
from .report import DataReport
from .rows import data_files
from .show import marked
from .source import Encoder, Source

__all__ = ["IGNORED", "Batch", "Data", "read"]

IGNORED = -100  # the target of a position that is not trained
ON_ERROR = ("raise", "skip")
TOO_LONG = ("raise", "drop", "cut")


class Batch(NamedTuple):
    """Packed rows, one after the other without padding: N positions, n pieces of documents.

    tokens: (1,N) int64. targets: (1,N) int64, the token to predict after each, or -100. cu_seqlens:
    (n+1,) int32 from 0 to N, the borders of the pieces; each sees itself only. longest: of the
    pieces, in positions. kept: how many targets are trained. n_bytes: UTF-8 bytes of these targets,
    special tokens 0, for bits per byte. reference: (P,2) float32, of data of preferences alone, if
    it was made before: the log-probabilities of the P pairs under the first model.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    longest: int
    kept: int
    n_bytes: int
    reference: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on a device."""
        moved = {n: t.to(device) for n, t in self._asdict().items() if isinstance(t, Tensor)}
        return self._replace(**moved)


class Data:
    """Packed rows of documents; `len` counts the rows. `read` makes it.

    sources: the encoded files. rows: of each row its pieces (source, start, end), positions of the
    source's ids. block: positions that a row can hold. report: what became of the files' rows.
    Raises DataError for no rows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: Sequence[Sequence[tuple[int, int, int]]],
        tokenizer: Tokenizer,
        block: int,
        report: DataReport,
    ) -> None:
        self.sources, self.block, self.report = list(sources), block, report
        self._tokenizer = tokenizer
        self._pieces = np.array([p for row in rows for p in row], np.int64).reshape(-1, 3)
        self._first = np.cumsum([0, *map(len, rows)])  # piece of each row
        special = tokenizer.special_names
        self._bytes = np.array(
            [0 if n in special else len(b) for n, b in enumerate(tokenizer.id_to_bytes)], np.int64
        )
        if not rows:
            raise DataError(f"of {report.rows} rows nothing is left to train on:\n{report}")
        report.packed, report.block = len(self), block
        report.tokens = int((self._pieces[:, 2] - self._pieces[:, 1]).sum())
        for n, source in enumerate(self.sources):
            starts, ends = self._pieces[self._pieces[:, 0] == n, 1:].T
            report.kept += int(source.trained(starts + 1, ends + 1).sum())

    def __len__(self) -> int:
        return len(self._first) - 1

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Returns the pieces (source, start, end) of a row."""
        return [
            tuple(piece) for piece in self._pieces[self._first[row] : self._first[row + 1]].tolist()
        ]

    def batch(self, indices: Iterable[int]) -> Batch:
        """Returns these rows as one batch. Raises DataError for none and for a row that there is
        not."""
        tokens, targets, lengths = [], [], [0]
        for row in indices:
            if not 0 <= row < len(self):
                raise DataError(f"row {row} is asked for, and there are {len(self)}; count from 0")
            for source, start, end in self.pieces(row):
                ids = self.sources[source].ids[start : end + 1].astype(np.int64)
                tokens.append(ids[:-1])
                targets.append(np.where(self._trained(source, start, end), ids[1:], IGNORED))
                lengths.append(end - start)
        if not tokens:
            raise DataError("a batch of no rows is asked for; give at least one")
        target = np.concatenate(targets)
        asked = target[target != IGNORED]
        return Batch(
            torch.from_numpy(np.concatenate(tokens))[None],
            torch.from_numpy(target)[None],
            torch.from_numpy(np.cumsum(lengths, dtype=np.int32)),
            max(lengths),
            len(asked),
            int(self._bytes[asked].sum()),
        )

    def order(self, seed: int, epoch: int) -> list[int]:
        """Returns the rows in the order of an epoch: a shuffle that depends on the arguments and
        the number of rows alone."""
        return shuffled(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Returns a text that differs where the rows do: their tokens, masks, packing or order."""
        found = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            found.update(source.key.encode())
        for part in (self._pieces, self._first, np.array([self.block], np.int64)):
            found.update(np.ascontiguousarray(part, np.int64))
        return found.hexdigest()

    def show(self, n: int = 3, *, color: bool = True) -> str:
        """Returns the first n pieces in the order of the files as text, their trained tokens green,
        or between ⟦ and ⟧ without colours."""
        first = np.lexsort((self._pieces[:, 1], self._pieces[:, 0]))[:n]
        rows = np.searchsorted(self._first, first, side="right") - 1
        pieces = self._pieces[first].tolist()
        shown = (self._shown(*pair, color) for pair in zip(rows.tolist(), pieces, strict=True))
        return "\n\n".join(shown)

    def _shown(self, row: int, piece: Sequence[int], color: bool) -> str:
        source, start, end = piece
        ids = self.sources[source].ids[start : end + 1].tolist()
        trained = [False, *self._trained(source, start, end).tolist()]
        document = int(np.searchsorted(self.sources[source].borders, start, side="right")) - 1
        place = f"{self.sources[source].path}, line {self.sources[source].lines[document]}"
        head = f"— row {row + 1}, {place}: {sum(trained)} of {len(ids)} tokens are trained"
        return f"{head}\n{marked(ids, trained, self._tokenizer, color)}"

    def _trained(self, source: int, start: int, end: int) -> np.ndarray:
        """Which of the positions start … end-1 ask for a trained token."""
        return self.sources[source].mask(start + 1, end + 1)


def read(
    paths: Any,
    tokenizer: Tokenizer,
    *,
    block: int = 2048,
    train_on: str = "answers",
    chat: ChatOrMaker = None,
    stride: int | None = None,
    cache: str | Path | None = None,
    on_error: str = "raise",
    too_long: str = "raise",
    progress: bool = True,
) -> Data:
    """Reads files of training data, encodes and packs them.

    paths: a file, a folder or several; the format of each row is told by its keys (`formats`).
    block: positions that a packed row can hold. train_on: "answers", "last" or "all" (`masks`).
    chat: the chat format of dialogs, or a function that makes it, which is called when the first
    dialog comes; None is the one that the tokenizer tells of (`ChatFormat.for_tokenizer`); a
    model's folder tells more (`tokenizer.chat_format`). stride:
    rows of plain text begin every so many positions; below the block they overlap. cache: a folder
    that keeps the ids of each file. on_error: "raise", or "skip" to leave rows with faults out,
    counted in the report. too_long: of a dialog that is longer than the block: "raise", "drop" it,
    or "cut" its end off; both are counted. progress: show a bar for long work.

    Raises DataError, which names the file and the line, for a row with a fault, a missing or an
    empty file, and data of which nothing is left.
    """
    check_words(
        ("train_on", train_on, TRAIN_ON),
        ("on_error", on_error, ON_ERROR),
        ("too_long", too_long, TOO_LONG),
    )
    if not isinstance(block, int) or block < 1:
        raise DataError(f"block is {block!r}; a row needs at least one position")
    if stride is not None and not (isinstance(stride, int) and 1 <= stride <= block):
        raise DataError(f"stride is {stride!r}; give 1 … {block} (the block)")
    sources, report = encoded(paths, tokenizer, chat, train_on, cache, on_error, progress)
    rows = _packed(sources, block, stride, too_long, report)
    return Data(sources, rows, tokenizer, block, report)


def check_words(*settings: tuple[str, str, Sequence[str]]) -> None:
    """Raises DataError for a setting (name, value, words) that is none of its words."""
    for name, value, allowed in settings:
        if value not in allowed:
            raise DataError(f"{name}={value!r} is unknown; give one of {', '.join(allowed)}")


def encoded(
    paths: Any,
    tokenizer: Tokenizer,
    chat: ChatOrMaker,
    train_on: str,
    cache: str | Path | None,
    on_error: str,
    progress: bool,
) -> tuple[list[Source], DataReport]:
    """Returns the sources of files, and a report that counts the files and the rows left out.
    Arguments as in `read`; train_on may be PREFERENCES."""
    if chat is None:
        chat = partial(_chat_of, tokenizer)
    files = data_files(paths)
    encoder = Encoder(tokenizer, chat, train_on, None if cache is None else Path(cache))
    with ReadingProgress(sum(path.stat().st_size for path in files), shown=progress) as bar:
        sources = [encoder.source(path, on_error == "skip", bar.advance) for path in files]
    report = DataReport(files=len(files), cached=encoder.from_cache)
    for source in sources:
        report.rows += len(source.faults)
        for line, reason in source.faults:
            report.drop(without_numbers(reason), f"{source.path}, line {line}")
    return sources, report


def _chat_of(tokenizer: Tokenizer) -> ChatFormat | None:
    try:
        return ChatFormat.for_tokenizer(tokenizer)
    except PromptError:
        return None  # a dialog says so


def without_numbers(reason: str) -> str:
    """A reason as one of a kind, so that equal ones are counted together."""
    return re.sub(r"\d[\d,]*", "N", reason.split(";")[0])


def _packed(
    sources: Sequence[Source], block: int, stride: int | None, too_long: str, report: DataReport
) -> list[list[tuple[int, int, int]]]:
    """The packed rows: plain text cut anywhere, then whole dialogs."""
    texts: list[tuple[int, int, int]] = []
    whole: list[tuple[int, int, int]] = []
    for n, source in enumerate(sources):
        report.rows += len(source.lines)
        starts, ends = source.borders[:-1].tolist(), (source.borders[1:] - 1).tolist()
        trained = source.trained(source.borders[:-1] + 1, source.borders[1:])
        for d, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if source.may_be_cut[d]:
                texts.append((n, start, end))
                report.documents += end > start
                continue
            line = int(source.lines[d])
            if end - start > block:
                reason = f"the row has {end - start} tokens, more than the block of {block}"
                if too_long == "raise":
                    raise DataError(
                        f'{reason}; give a larger block, or too_long="drop" or "cut"',
                        source.path,
                        line,
                    )
                if too_long == "drop":
                    report.drop(without_numbers(reason), f"{source.path}, line {line}")
                    continue
                end = start + block
                report.cut += 1
                trained[d] = source.mask(start + 1, end + 1).sum()
            if not trained[d]:
                report.drop("no token of the row is trained", f"{source.path}, line {line}")
                continue
            whole.append((n, start, end))
            report.documents += 1
    rows = cut(texts, block, stride)
    lengths = [end - start for _, start, end in whole]
    rows += [[whole[item] for item in row] for row in best_fit(lengths, block)]
    return rows
