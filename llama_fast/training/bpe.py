"""Trains a byte-level BPE vocabulary in which a token's rank is its id, for the Llama 3 pattern.

The text is split into pieces by the tokenizer's pattern and each distinct piece is kept once, with
its count. Then, token by token, the most frequent pair of neighbours becomes a new token, merged
from left to right in every piece that holds it. Counts are kept up to date, not taken anew.

An encoder that knows only ranks merges any two neighbours whose bytes are a token. It arrives at
the trainer's own segmentation, because the bytes of a token are never split in two ways: between
two borders that no merge has crossed, merging went as it goes on those bytes alone. So a pair of
neighbours is identified by the bytes it makes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from ..errors import TokenizerError
from ..tokenizer import PIECES
from ..tokenizer.files import BYTE_ORDER


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[bytes]:
    """The `vocab_size` tokens in rank order: 256 single bytes, then merges, most frequent first.

    vocab_size counts ranks only; the 256 special tokens come on top. progress(done, total) is
    called after each merge. The result depends on nothing but the multiset of pieces; of equally
    frequent pairs, the one whose bytes sort first is taken. A pair must occur at least twice.

    Raises TokenizerError for a vocab_size below 256 and for a text too small to fill it.
    """
    return _Trainer(texts).train(vocab_size, progress)


class _Trainer:
    """pieces: distinct pieces as bytes; counts[w]; parts[w]: the tokens of piece w at this step."""

    def __init__(self, texts: Iterable[str]):
        if isinstance(texts, str):
            raise TokenizerError("train_bpe takes several texts, not one str; give [text]")
        found = Counter(piece for text in texts for piece in PIECES.findall(text))
        self.pieces = [piece.encode() for piece in found]
        self.counts = list(found.values())
        self.parts = [[bytes([b]) for b in piece] for piece in self.pieces]
        self.tokens = [bytes([b]) for b in BYTE_ORDER]
        self.pairs: Counter[bytes] = Counter()  # bytes a pair would make -> occurrences
        self.where: defaultdict[bytes, set[int]] = defaultdict(set)  # -> pieces, some outdated
        for w, parts in enumerate(self.parts):
            for a, b in itertools.pairwise(parts):
                self.pairs[a + b] += self.counts[w]
                self.where[a + b].add(w)
        # Entries (-occurrences, bytes) may be outdated; an entry counts when it agrees with pairs.
        self.heap = [(-n, made) for made, n in self.pairs.items()]
        heapq.heapify(self.heap)

    def train(self, vocab_size: int, progress: Callable[[int, int], None] | None) -> list[bytes]:
        first = len(self.tokens)
        if vocab_size < first:
            raise TokenizerError(f"vocab_size={vocab_size} cannot hold the {first} single bytes")
        while len(self.tokens) < vocab_size:
            token = self._most_frequent()
            if token is None:
                raise TokenizerError(
                    f"the text gives {len(self.tokens)} tokens, not {vocab_size}: give more text "
                    "or a smaller vocab_size"
                )
            self._add(token)
            if progress is not None:
                progress(len(self.tokens) - first, vocab_size - first)
        return self.tokens

    def _most_frequent(self) -> bytes | None:
        while self.heap:
            count, made = heapq.heappop(self.heap)
            if -count == self.pairs[made] >= 2:
                return made
        return None

    def _add(self, token: bytes) -> None:
        self.tokens.append(token)
        changed: set[bytes] = set()
        for w in self.where.pop(token):
            self._merge(w, token, changed)
        for made in changed:
            if self.pairs[made] >= 2:
                heapq.heappush(self.heap, (-self.pairs[made], made))

    def _merge(self, w: int, token: bytes, changed: set[bytes]) -> None:
        """Makes `token` wherever piece w has it as a pair; adds to `changed` the pairs affected."""
        parts, count, at = self.parts[w], self.counts[w], 0
        while at + 1 < len(parts):
            if parts[at] + parts[at + 1] == token:
                for a, b in itertools.pairwise(parts[max(at - 1, 0) : at + 3]):
                    self.pairs[a + b] -= count
                    changed.add(a + b)
                parts[at : at + 2] = [token]
                for a, b in itertools.pairwise(parts[max(at - 1, 0) : at + 2]):
                    self.pairs[a + b] += count
                    self.where[a + b].add(w)
                    changed.add(a + b)
            at += 1
