"""What every baseline of the model benchmark can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Baseline(ABC):
    """A model that decodes one sequence; the weights are random, and the same for all baselines.

    Each lives in a process of its own, in which torch has been told its number of threads.
    """

    @abstractmethod
    def prefill(self, tokens: list[int]) -> None:
        """Runs a prompt from an empty cache, for the logits of its last token."""

    @abstractmethod
    def step(self, token: int) -> None:
        """Runs one token after those before."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Those of the last token that was run, (V,) float32; valid until the next call."""

    def decode(self, count: int) -> None:
        """Makes `count` more tokens, one a step: each time the likeliest."""
        for _ in range(count):
            self.step(int(self.logits().argmax()))

    def logits_after(self, tokens: list[int], steps: int) -> np.ndarray:
        """Those after all of `tokens`, the last `steps` of them run one at a time."""
        self.prefill(tokens[: len(tokens) - steps])
        for token in tokens[len(tokens) - steps :]:
            self.step(token)
        return self.logits().copy()
