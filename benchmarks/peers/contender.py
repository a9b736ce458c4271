"""What every contender of the model benchmark can do."""

from __future__ import annotations

from typing import Protocol


class Contender(Protocol):
    """A model of the shape, with random weights, that decodes one sequence."""

    name: str

    def prefill(self, tokens: list[int]) -> None:
        """Runs a prompt from an empty cache, for the logits of its last token."""

    def decode(self, count: int) -> None:
        """Makes `count` more tokens, one a step, after the last prefill."""
