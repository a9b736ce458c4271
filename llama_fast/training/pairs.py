"""Files of preferences become packed rows of whole pairs: a chosen and a rejected answer each.

data = read_pairs("preferences.jsonl", tokenizer, block=1024)
batch = data.batch([0, 1])      # pieces 0, 2, 4 … are chosen answers, 1, 3, 5 … the rejected
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tokenizer import Tokenizer
from .data import ON_ERROR, Data, check_words, encoded, without_numbers
from .masks import PREFERENCES, ChatOrMaker
from .packing import best_fit
from .report import DataReport
from .source import Source


def read_pairs(
    paths: Any,
    tokenizer: Tokenizer,
    *,
    block: int = 2048,
    chat: ChatOrMaker = None,
    cache: str | Path | None = None,
    on_error: str = "raise",
    too_long: str = "raise",
    progress: bool = True,
) -> Data:
    """Reads files of preferences (`formats`), encodes and packs them. Returns rows of up to 2·block
    positions, each of whole pairs: its pieces are by turns a chosen and a rejected answer with
    their prompt. Trained are the tokens of the answers: from the first message on in which the two
    differ, with the tokens that end them.

    block: positions that an answer with its prompt may have. chat, cache, on_error, progress: as in
    `data.read`. too_long: of a pair with a longer answer: "raise", or "drop", which is counted;
    half an answer is not what was preferred, so nothing is cut.

    Raises DataError, which names the file and the line, for a row with a fault, for one that is no
    preference or whose answers are the same, and for data of which nothing is left.
    """
    check_words(("on_error", on_error, ON_ERROR), ("too_long", too_long, ("raise", "drop")))
    if not isinstance(block, int) or block < 1:
        raise DataError(f"block is {block!r}; an answer needs at least one position")
    sources, report = encoded(paths, tokenizer, chat, PREFERENCES, cache, on_error, progress)
    rows = _packed(sources, block, too_long, report)
    return Data(sources, rows, tokenizer, 2 * block, report)


def _packed(
    sources: Sequence[Source], block: int, too_long: str, report: DataReport
) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (source, start, end), two for each pair."""
    pairs: list[tuple[tuple[int, int, int], tuple[int, int, int]]] = []
    for n, source in enumerate(sources):
        report.rows += len(source.lines) // 2
        pieces = [
            (n, start, end - 1)
            for start, end in zip(source.borders[:-1].tolist(), source.borders[1:].tolist(),
                                  strict=True)
        ]  # fmt: skip
        for first in range(0, len(pieces), 2):
            longest = max(end - start for _, start, end in pieces[first : first + 2])
            if longest <= block:
                pairs.append((pieces[first], pieces[first + 1]))
                continue
            line = int(source.lines[first])
            reason = f"an answer with its prompt has {longest} tokens, more than {block}"
            if too_long == "raise":
                raise DataError(
                    f'{reason}; give a larger block, or too_long="drop"', source.path, line
                )
            report.drop(without_numbers(reason), f"{source.path}, line {line}")
    report.documents = 2 * len(pairs)
    lengths = [sum(end - start for _, start, end in pair) for pair in pairs]
    packed = best_fit(lengths, 2 * block)
    return [[piece for item in row for piece in pairs[item]] for row in packed]
