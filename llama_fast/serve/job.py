"""One answer that is to be made, and what is made of it token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..generation.generate import Rows
from ..generation.grammar import Matcher
from ..generation.sampling import Sampling


@dataclass(frozen=True)
class Piece:
    """One new token of an answer, or why there are no more.

    text: what can be shown now. top: the likeliest tokens here, (id, logprob). finish_reason: as in
    `generate.Chunk`. error: what ended the answer; all else is empty then.
    """

    token: int = -1
    text: str = ""
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """An answer to one prompt.

    rows: the state of its text, of one row. top: how many of the likeliest tokens each piece tells.
    address: whatever tells the receiver of the pieces which answer they are of. ends: says of each
    token and its text whether the answer ends with it, besides what `rows` finds. made: tokens so
    far. reused: tokens of the prompt that were not computed again. A job that is cancelled gets no
    more pieces.
    """

    rows: Rows
    sampling: Sampling
    top: int = 0
    address: Any = None
    ends: Callable[[int, str], bool] | None = None
    made: int = 0
    reused: int = 0
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def ids(self) -> list[int]:
        return self.rows.prompts[0]

    @property
    def matcher(self) -> Matcher | None:
        return self.rows.matchers[0]
