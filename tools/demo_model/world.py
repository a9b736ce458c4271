"""The teller: draws facts of the world for a text, and keeps some combinations from training."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llama_fast.errors import LlamaFastError

from .facts import SEASONS, WEATHER, Named
from .grammar import expand

Item = TypeVar("Item")

ANSWER_PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
ANSWER = "42"

SPLITS = ("train", "seed", "combinations")
"""``seed``: combinations of facts as in training, told anew. ``combinations``: texts whose two
leading facts (hero and place, giver and receiver, the numbers of a sum) never lead a text in
training together."""

_HELD_OUT_ONE_IN = 12


def held_out(*facts: str) -> bool:
    """Whether this combination of facts is kept from training: one in twelve, always the same."""
    return zlib.crc32("·".join(facts).encode()) % _HELD_OUT_ONE_IN == 0


class Teller:
    """Draws facts for one split from one seed; tells them in ``language`` (``en`` or ``zh``)."""

    def __init__(self, seed: int, split: str) -> None:
        if split not in SPLITS:
            raise LlamaFastError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        # A str seeds by its bytes, the same on every machine and Python version.
        self.rng = random.Random(f"{split} {seed}")
        self.split = split
        self.language = "en"
        self.boundary = ""  # between the words that are put together, for training a tokenizer

    def one(self, items: Sequence[Item]) -> Item:
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def other(self, items: Sequence[Item], *used: Item) -> Item:
        """One of ``items`` that is none of ``used``."""
        return self.one([item for item in items if item not in used])

    def pair(self, first: Sequence[Named], second: Sequence[Named]) -> tuple:
        """One of each, two different ones, combined as this split allows."""
        while True:
            a, b = self.one(first), self.one(second)
            if a != b and held_out(a.en, b.en) == (self.split == "combinations"):
                return a, b

    def numbers(self, sign: str, low: int, high: int) -> tuple[int, int]:
        """Two numbers for a sum, combined as this split allows; for ``-`` the larger one first."""
        while True:
            a, b = self.number(low, high), self.number(low, high)
            if sign == "-":
                a, b = max(a, b), min(a, b)
            if held_out(str(a), sign, str(b)) == (self.split == "combinations"):
                return a, b

    def season_and_weather(self) -> tuple[Named, Named]:
        """Snow falls in winter only, and winter is never warm."""
        season = self.one(SEASONS)
        winter = season.en == "winter"
        fitting = [w for w in WEATHER if w.en != ("warm" if winter else "snowy")]
        return season, self.one(fitting)

    def say(self, template: str, **cast: object) -> str:
        """One reading of ``template`` (see ``grammar``)."""
        return expand(template, self.rng, self.language, cast, self.boundary)


@dataclass(frozen=True)
class Kind:
    """A kind of document: how often it is told, by which function, whether it combines facts."""

    weight: float
    tell: Callable[[Teller], str]
    combines: bool
