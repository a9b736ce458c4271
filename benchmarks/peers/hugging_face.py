"""transformers' LlamaForCausalLM, as a user gets it: eager, SDPA attention, dynamic cache."""

from __future__ import annotations

import torch
import transformers

from llama_fast.config import LlamaConfig


class HuggingFace:
    name = "transformers"

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig.from_dict(config.to_hf())
            )
        self.model = model.to(dtype).to_empty(device="cpu").eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for module in self.model.modules():  # buffers came out of `to_empty` unset
            if hasattr(module, "original_inv_freq"):
                fresh = type(module)(self.model.config)
                module.inv_freq = fresh.inv_freq
                module.original_inv_freq = fresh.inv_freq

    @torch.no_grad()
    def prefill(self, tokens: list[int]) -> None:
        self.out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, count: int) -> None:
        for _ in range(count):
            token = self.out.logits[:, -1].argmax(-1, keepdim=True)
            self.out = self.model(token, past_key_values=self.out.past_key_values, use_cache=True)
