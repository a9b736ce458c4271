"""llama_fast itself."""

from __future__ import annotations

import torch

from llama_fast.model import Llama


class Ours:
    name = "llama_fast"

    def __init__(self, model: Llama, context: int) -> None:
        self.model = model.eval()
        self.cache = model.new_cache(1, context)

    def prefill(self, tokens: list[int]) -> None:
        self.cache.reset()
        self.logits = self.model(torch.tensor([tokens]), cache=self.cache, last_only=True)

    def decode(self, count: int) -> None:
        for _ in range(count):
            token = self.logits[:, -1].argmax(-1, keepdim=True)
            self.logits = self.model(token, cache=self.cache, last_only=True)
