"""Sentences from templates: ``[this|that]`` chooses, ``{a}`` and ``{a.he}`` insert the cast.

``"{a} [ran|walked] [quickly |]home."`` has four readings. Choices nest; an empty choice is allowed.
"""

from __future__ import annotations

import random
from functools import cache

from llama_fast.errors import LlamaFastError

_STOPS = "[]|{}"


@cache
def _parse(template: str) -> tuple:
    """A template as pieces: a str, ``("field", name, attributes)`` or ``("choice", readings)``."""
    pieces, end = _sequence(template, 0)
    if end != len(template):
        raise LlamaFastError(
            f"the template {template!r} has a stray {template[end]!r} at {end}; "
            "close every '[' and use '|' only inside brackets"
        )
    return pieces


def _sequence(template: str, at: int) -> tuple[tuple, int]:
    pieces: list = []
    while at < len(template) and template[at] not in "|]":
        if template[at] == "[":
            readings = []
            while True:
                reading, at = _sequence(template, at + 1)
                readings.append(reading)
                if at >= len(template):
                    raise LlamaFastError(f"the template {template!r} lacks a ']'; add it")
                if template[at] == "]":
                    break
            pieces.append(("choice", tuple(readings)))
            at += 1
        elif template[at] == "{":
            close = template.index("}", at)
            name, *attributes = template[at + 1 : close].split(".")
            pieces.append(("field", name, tuple(attributes)))
            at = close + 1
        else:
            start = at
            while at < len(template) and template[at] not in _STOPS:
                at += 1
            pieces.append(template[start:at])
    return tuple(pieces), at


def expand(
    template: str,
    rng: random.Random,
    language: str,
    cast: dict[str, object],
    boundary: str = "",
) -> str:
    """One reading of ``template``; what is no str or int is called by its name in ``language``.

    ``boundary`` is put between pieces of the template and what is inserted into it.
    """
    words: list[str] = []
    _expand(_parse(template), rng, language, cast, words)
    return boundary.join(words)


def _expand(pieces: tuple, rng: random.Random, language: str, cast: dict, words: list[str]) -> None:
    for piece in pieces:
        if isinstance(piece, str):
            words.append(piece)
        elif piece[0] == "choice":
            # int(random() * n) is several times faster than choice() and as good for a short list.
            readings = piece[1]
            _expand(readings[int(rng.random() * len(readings))], rng, language, cast, words)
        else:
            _, name, attributes = piece
            value = cast[name]
            for attribute in attributes:
                value = getattr(value, attribute)
            if not isinstance(value, (str, int)):
                value = getattr(value, language)
            words.append(str(value))
