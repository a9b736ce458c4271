"""transformers' LlamaForCausalLM, as a user gets it: eager, SDPA attention, dynamic cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from .baseline import Baseline


class HuggingFace(Baseline):
    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.eval()

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> None:
        self.out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step(self, token: int) -> None:
        self.out = self.model(
            torch.tensor([[token]]), past_key_values=self.out.past_key_values, use_cache=True
        )

    def logits(self) -> np.ndarray:
        return self.out.logits[0, -1].float().numpy()
