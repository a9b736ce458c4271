"""Trains byte-level BPE, from single bytes or on from a vocabulary, for the Llama 3 pattern.

A text's pieces, each once with its count, lie there as tokens. Then, token by token, the most
frequent pair of neighbours becomes a new token, merged from left to right in every piece that holds
it. Counts are kept up to date, not taken anew.

An encoder that knows only ranks merges any two neighbours whose bytes are a token, the lowest rank
first. New tokens have the highest ranks, so it begins with the old encoding and goes on as the
trainer does: the new encoding only joins tokens of the old one. Two facts make the trainer's
segmentation the encoder's own:

- The bytes of a token are never split in two ways: between two borders that no merge has crossed,
  merging went as it goes on those bytes alone. So a pair is identified by the bytes it makes.
- A vocabulary may hold tokens that merging its other tokens cannot reach (588 of Llama 3's). A new
  token can open the way to one: such a pair is merged at once, and takes no new rank.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import TokenizerError
from .files import BYTE_ORDER
from .tokenizer import PIECES

Progress = Callable[[int, int], None]


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, progress: Progress | None = None
) -> list[bytes]:
    """The `vocab_size` tokens in rank order: 256 single bytes, then merges, most frequent first.

    vocab_size counts ranks only; the 256 special tokens come on top. progress(done, total) is
    called after each merge. The result depends on nothing but the multiset of pieces; of equally
    frequent pairs, the one whose bytes sort first is taken. A pair must occur at least twice.

    Raises TokenizerError for a vocab_size below 256 and for a text too small to fill it.
    """
    if isinstance(texts, str):
        raise TokenizerError("train_bpe takes several texts, not one str; give [text]")
    singles = [bytes([b]) for b in BYTE_ORDER]
    if vocab_size < len(singles):
        raise TokenizerError(f"vocab_size={vocab_size} cannot hold the {len(singles)} single bytes")
    found = Counter(piece for text in texts for piece in PIECES.findall(text))
    words = (([bytes([b]) for b in piece.encode()], count) for piece, count in found.items())
    trainer = Trainer(words, {token: rank for rank, token in enumerate(singles)})
    trainer.train(vocab_size - len(singles), progress)
    if len(trainer.new) < vocab_size - len(singles):
        raise TokenizerError(
            f"the text gives {len(singles) + len(trainer.new)} tokens, not {vocab_size}: give more "
            "text or a smaller vocab_size"
        )
    return [*singles, *trainer.new]


class Trainer:
    """Words as lists of tokens, in which the most frequent pairs become tokens.

    words: distinct pieces as the tokens that `ranks` makes of them, each with its count. ranks: the
    vocabulary so far, token to rank. Attributes: new, the tokens found, in rank order; parts[w],
    the tokens of word w at this step; counts[w].
    """

    def __init__(self, words: Iterable[tuple[Sequence[bytes], int]], ranks: Mapping[bytes, int]):
        self.new: list[bytes] = []
        self.parts: list[list[bytes]] = []
        self.counts: list[int] = []
        self._ranks = dict(ranks)
        self._next = 1 + max(self._ranks.values())
        self._pairs: Counter[bytes] = Counter()  # bytes a pair would make -> occurrences
        self._where: defaultdict[bytes, set[int]] = defaultdict(set)  # -> words, some outdated
        for w, (parts, count) in enumerate(words):
            self.parts.append(list(parts))
            self.counts.append(count)
            for a, b in itertools.pairwise(parts):
                self._pairs[a + b] += count
                self._where[a + b].add(w)
        # Entries (-occurrences, bytes) may be outdated; an entry counts when it agrees with pairs.
        self._heap = [(-n, made) for made, n in self._pairs.items()]
        heapq.heapify(self._heap)

    def train(
        self,
        n: int,
        progress: Progress | None = None,
        *,
        min_count: int = 2,
        max_chars: int | None = None,
    ) -> None:
        """Finds `n` new tokens more, fewer where no further pair occurs `min_count` times and has
        at most `max_chars` characters. progress(done, n) is called after each."""
        for done in range(1, n + 1):
            token = self._most_frequent(min_count)
            while token is not None and max_chars is not None and _chars(token) > max_chars:
                token = self._most_frequent(min_count)
            if token is None:
                return
            self._add(token, min_count)
            if progress is not None:
                progress(done, n)

    def _most_frequent(self, min_count: int) -> bytes | None:
        while self._heap:
            count, made = heapq.heappop(self._heap)
            if -count == self._pairs[made] >= min_count:
                return made
        return None

    def _add(self, token: bytes, min_count: int) -> None:
        self.new.append(token)
        self._ranks[token] = self._next
        self._next += 1
        changed: set[bytes] = set()
        for w in self._where.pop(token):
            self._merge(w, token, changed)
        for made in changed:
            if self._pairs[made] >= min_count:
                heapq.heappush(self._heap, (-self._pairs[made], made))

    def _merge(self, w: int, token: bytes, changed: set[bytes]) -> None:
        """Makes `token` wherever word w has it as a pair; adds to `changed` the pairs affected."""
        parts, at = self.parts[w], 0
        while at + 1 < len(parts):
            if parts[at] + parts[at + 1] == token:
                self._join(w, at, changed)
                while (way := self._known_beside(parts, at)) is not None:
                    at += way
                    self._join(w, at, changed)
            at += 1

    def _join(self, w: int, at: int, changed: set[bytes]) -> None:
        parts, count = self.parts[w], self.counts[w]
        for a, b in itertools.pairwise(parts[max(at - 1, 0) : at + 3]):
            self._pairs[a + b] -= count
            changed.add(a + b)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for a, b in itertools.pairwise(parts[max(at - 1, 0) : at + 2]):
            self._pairs[a + b] += count
            self._where[a + b].add(w)
            changed.add(a + b)

    def _known_beside(self, parts: list[bytes], at: int) -> int | None:
        """Where, from the token at `at`, a pair begins that is a token already: -1, 0, or None for
        no such pair. Of two the lower rank, as the encoder takes it."""
        best = None
        for way in (-1, 0):
            if 0 <= at + way and at + way + 1 < len(parts):
                rank = self._ranks.get(parts[at + way] + parts[at + way + 1])
                if rank is not None and (best is None or rank < best[0]):
                    best = rank, way
        return None if best is None else best[1]


def _chars(token: bytes) -> int:
    """How many characters begin in a token."""
    return sum(byte & 0xC0 != 0x80 for byte in token)


def merge(text: bytes, ranks: Mapping[bytes, int]) -> tuple[list[bytes], list[bytes]]:
    """Returns the tokens that merging makes of these bytes, the lowest rank first, leftmost on
    ties, and all that it made on the way, in this order. Every single byte must have a rank."""
    parts, made = [bytes([b]) for b in text], []
    while True:
        pairs = (a + b for a, b in itertools.pairwise(parts))
        found = min(((ranks[p], at) for at, p in enumerate(pairs) if p in ranks), default=None)
        if found is None:
            return parts, made
        at = found[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.append(parts[at])
