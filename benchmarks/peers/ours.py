"""llama_fast itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llama_fast.cli.measure import bytes_per_token
from llama_fast.dispatch import use_backend
from llama_fast.generation.engine import Engine
from llama_fast.model import Llama

from .baseline import Baseline


class Ours(Baseline):
    """quantize  as `Llama.from_pretrained` takes it, which raises ConfigError for what it lacks
    backend   None: the device's usual order, as a user gets it"""

    def __init__(
        self, folder: Path, context: int, quantize: str | None = None, backend: str | None = None
    ) -> None:
        at_most = {"max_seq_len": context, "quantize": quantize}
        self.model = Llama.from_pretrained(folder, device="cpu", **at_most)
        self.engine = Engine(self.model, self.model.new_cache(1, context))
        if backend is not None:
            use_backend(backend, strict=True).__enter__()  # until the process ends

    def prefill(self, tokens: list[int]) -> None:
        self.engine.reset()
        self.out = self.engine.prefill([tokens])

    def step(self, token: int) -> None:
        self.out = self.engine.step(torch.tensor([token]))

    def logits(self) -> np.ndarray:
        return self.out[0].numpy()

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Those of all tokens but the first, each after those before it, (T-1,) float32."""
        found = self.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()

    def bytes_per_token(self, context: float) -> float:
        return bytes_per_token(self.model, context)
