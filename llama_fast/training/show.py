"""Tokens as text for people, the trained ones marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from ..tokenizer import Tokenizer

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
# Other than line ends and tabs, control characters of a text would control the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def marked(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer, color: bool) -> str:
    """Returns the text of ids; runs of trained ones are green and the others dim, or, without
    colours, between ⟦ and ⟧. A character whose bytes are in two runs is shown as U+FFFD."""
    parts = []
    for run, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([id_ for id_, _ in group])
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        if color:
            parts.append(f"{_GREEN if run else _DIM}{text}{_PLAIN}")
        else:
            parts.append(f"⟦{text}⟧" if run else text)
    return "".join(parts)
