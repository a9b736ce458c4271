"""How well a vocabulary fits texts: tokens, bytes and characters a token, by script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import regex

from ..errors import TokenizerError
from .tokenizer import Tokenizer

# A token counts for the script of its letters, and for "other" where it has none of these: digits,
# signs, blanks.
SCRIPTS = (
    "Latin", "Han", "Hiragana", "Katakana", "Hangul", "Cyrillic", "Greek", "Arabic", "Hebrew",
    "Devanagari", "Thai",
)  # fmt: skip
OTHER = "other"
_SCRIPT = regex.compile("|".join(rf"(\p{{Script={name}}}+)" for name in SCRIPTS))
LONGEST = 20


@dataclass
class Fit:
    """Sums over the tokens of one script, or of all.

    fallback: tokens that are no whole characters by themselves, as bytes of a character that the
    vocabulary does not have.
    """

    tokens: int = 0
    nbytes: int = 0
    characters: int = 0
    fallback: int = 0

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens if self.tokens else 0.0

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens if self.tokens else 0.0

    @property
    def fallback_share(self) -> float:
        return self.fallback / self.tokens if self.tokens else 0.0


@dataclass
class Report:
    """What `measure` finds. texts, lines: how many; blank lines do not count. all: of all tokens.
    by_script: of the scripts that occur, most tokens first. used: distinct tokens that occur, of
    `vocab_size`. longest: the longest of these, in characters, with how often each occurs."""

    vocab_size: int
    texts: int = 0
    lines: int = 0
    all: Fit = field(default_factory=Fit)
    by_script: dict[str, Fit] = field(default_factory=dict)
    used: int = 0
    longest: list[tuple[str, int]] = field(default_factory=list)

    @property
    def tokens_per_line(self) -> float:
        return self.all.tokens / self.lines if self.lines else 0.0


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Report:
    """Returns how the vocabulary encodes the texts. Raises TokenizerError for no text at all."""
    report = Report(tokenizer.vocab_size)
    names = (OTHER, *SCRIPTS)
    lengths = np.array([len(token) for token in tokenizer.id_to_bytes])
    whole = np.array([_is_whole(token) for token in tokenizer.id_to_bytes])
    sums = np.zeros((len(names), 4), np.int64)
    used: Counter[int] = Counter()
    for text in texts:
        report.texts += 1
        report.lines += sum(1 for line in text.splitlines() if line.strip())
        ids = np.array(tokenizer.encode(text), np.int64)
        if not len(ids):
            continue
        used.update(ids.tolist())
        starts = np.concatenate([[0], np.cumsum(lengths[ids])[:-1]])
        codes, begins = _characters(text)
        script = np.maximum.reduceat(codes, starts)
        columns = np.ones(len(ids)), lengths[ids], np.add.reduceat(begins, starts), ~whole[ids]
        for column, values in enumerate(columns):
            counted = np.bincount(script, weights=values, minlength=len(names))
            sums[:, column] += counted.astype(np.int64)
    if not used:
        raise TokenizerError("there is no text to encode; give texts that are not empty")
    report.all = Fit(*map(int, sums.sum(0)))
    fits = {name: Fit(*map(int, row)) for name, row in zip(names, sums, strict=True) if row[0]}
    report.by_script = dict(sorted(fits.items(), key=lambda entry: -entry[1].tokens))
    report.used = len(used)
    words = [
        (tokenizer.id_to_bytes[id_].decode(), count) for id_, count in used.items() if whole[id_]
    ]
    report.longest = sorted(words, key=lambda word: (-len(word[0]), word[0]))[:LONGEST]
    return report


def _is_whole(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _characters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each byte of a text: the script of its character (0: none of them), and whether it is the
    first byte of one."""
    codes = np.zeros(len(text), np.int64)
    for run in _SCRIPT.finditer(text):
        codes[run.start() : run.end()] = run.lastindex
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    nbytes = 1 + (points > 0x7F) + (points > 0x7FF).astype(np.int64) + (points > 0xFFFF)
    begins = np.zeros(nbytes.sum(), np.int64)
    begins[np.concatenate([[0], np.cumsum(nbytes)[:-1]])] = 1
    return np.repeat(codes, nbytes), begins
