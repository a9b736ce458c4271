"""A corpus as what BPE learns from: distinct pieces with their counts, as tokens of a vocabulary.

Memory is bounded by `MAX_PIECES` distinct pieces, whatever the corpus. Where there are more, the
rarest are thinned out: every second one goes, and the other counts double, so that the counts of
pairs stay right on average. In Chinese most pieces are clauses that occur once, and dropping them
all would drop most of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate

import regex

from ..errors import TokenizerError
from .tokenizer import PIECES, Tokenizer, slices, splitter

MAX_PIECES = 500_000
# A longer piece is cut: its place in the counts costs time in each merge that it takes part in.
LONGEST_WORD = 256  # tokens


def count_pieces(
    texts: Iterable[str], tokenizer: Tokenizer, *, max_pieces: int = MAX_PIECES
) -> Counter[str]:
    """Returns how often each piece occurs in the texts, which are gone through once. Added words of
    the vocabulary are no part of any piece."""
    found: Counter[str] = Counter()
    words = splitter(frozenset(tokenizer.added)) if tokenizer.added else None
    for text in texts:
        for part in words.split(text)[::2] if words else (text,):
            for piece in slices(part):
                found.update(PIECES.findall(piece))
                if len(found) > max_pieces:
                    thin(found, max_pieces)
    return found


def thin(found: Counter[str], max_pieces: int) -> None:
    """Removes pieces until at most three quarters of `max_pieces` are left: of those that occur
    once every second one, in the order in which they came first, while the others count twice; then
    of those that occur twice or less, and so on."""
    level = 1
    while len(found) > max_pieces * 3 // 4:
        rare = [piece for piece, count in found.items() if count <= level]
        for piece in rare[::2]:
            del found[piece]
        for piece in rare[1::2]:
            found[piece] *= 2
        level *= 2


def words(
    found: Counter[str], tokenizer: Tokenizer, scripts: Collection[str] = ()
) -> Iterator[tuple[list[bytes], int]]:
    """Yields the pieces as the tokens that the vocabulary makes of them, each with its count; those
    of a single token are left out.

    scripts: names of Unicode scripts ("Han", "Cyrillic"); of each piece only the stretches of
    tokens that lie within a run of such characters are yielded. Raises TokenizerError for an
    unknown one.
    """
    runs = _runs(scripts)
    to_bytes = tokenizer.id_to_bytes
    for piece, count in found.items():
        if runs is not None and not runs.search(piece):
            continue
        parts = [to_bytes[id_] for id_ in tokenizer.encode_words(piece, {})]
        for stretch in (parts,) if runs is None else _within(parts, piece, runs):
            for start in range(0, len(stretch), LONGEST_WORD):
                word = stretch[start : start + LONGEST_WORD]
                if len(word) > 1:
                    yield word, count


def _runs(scripts: Collection[str]) -> regex.Pattern[str] | None:
    """What finds the runs of characters of these scripts; None where all characters are meant."""
    if isinstance(scripts, str):
        scripts = [scripts]
    for script in scripts:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error:
            raise TokenizerError(
                f"{script!r} is the name of no Unicode script; give for example Han, Hiragana, "
                "Cyrillic, Arabic or Devanagari"
            ) from None
    if not scripts:
        return None
    return regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]+")


def _within(parts: list[bytes], piece: str, runs: regex.Pattern[str]) -> Iterator[list[bytes]]:
    """Yields the stretches of tokens that lie within a run."""
    ends = list(accumulate(map(len, parts)))
    at = start = stop = done = 0  # a place among the tokens; places in bytes; in characters
    for run in runs.finditer(piece):
        start = stop + len(piece[done : run.start()].encode())
        stop, done = start + len(run[0].encode()), run.end()
        while at < len(parts) and ends[at] - len(parts[at]) < start:
            at += 1
        first = at
        while at < len(parts) and ends[at] <= stop:
            at += 1
        yield parts[first:at]
