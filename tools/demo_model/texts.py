"""The endless stream of documents from which the demo model learns, and on which it is judged."""

from __future__ import annotations

from collections.abc import Iterator

from . import chinese, english
from .world import Teller


def documents(
    seed: int, split: str = "train", *, chinese_share: float = 0.5, boundary: str = ""
) -> Iterator[str]:
    """Texts without end: stories, letters, dialogues, questions, facts and sums in both languages.

    The same seed and split give the same texts on every machine. Of the split ``combinations`` only
    the kinds of text that combine facts are told. ``boundary`` is put between the words of Chinese,
    which has no spaces. Raises ``LlamaFastError`` for an unknown split.
    """
    teller = Teller(seed, split)
    kinds = {
        module: [k for k in module.KINDS if k.combines or split != "combinations"]
        for module in (chinese, english)
    }
    while True:
        module = chinese if teller.chance(chinese_share) else english
        teller.language = module.LANGUAGE
        teller.boundary = boundary if module is chinese else ""
        weights = [kind.weight for kind in kinds[module]]
        (kind,) = teller.rng.choices(kinds[module], weights)
        yield module.polish(kind.tell(teller))
