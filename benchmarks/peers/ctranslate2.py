"""CTranslate2: int8 weights with a scale for each row, converted from the Hugging Face folder.

Each row of activations is rounded to 8 bits before a matrix; all else, the KV cache included, is
float32. There are no 4 bits, and no bfloat16 on CPUs.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

# Read when the library is loaded: its OpenMP would otherwise spin for 200 ms after a call, into
# the turn of the next baseline.
os.environ["KMP_BLOCKTIME"] = "20"

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import Converter
from ctranslate2.converters.transformers import LlamaLoader

from .baseline import Baseline


def word(token: int) -> str:
    """Generators are fed words of a vocabulary; ours has one of no meaning for each id."""
    return f"<{token}>"


class _Llama(Converter):
    """CTranslate2's own loader, without the tokenizer that its converter asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @torch.no_grad()
    def _load(self) -> object:
        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)
        spec = LlamaLoader().get_model_spec(model)
        spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = map(word, range(3))
        spec.config.layer_norm_epsilon = model.config.rms_norm_eps
        spec.register_vocabulary([word(token) for token in range(model.config.vocab_size)])
        return spec


def convert(folder: Path, target: Path) -> None:
    """Writes a Hugging Face folder as one of CTranslate2's, in int8, into a folder that exists."""
    _Llama(folder).convert(str(target), quantization="int8", force=True)


class CTranslate2(Baseline):
    """A sequence is one call of `generate_batch`, in a thread that waits after each token."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        self.model = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="int8", intra_threads=threads
        )
        self.room, self.running = context, False
        self.asked, self.made = threading.Semaphore(0), threading.Semaphore(0)

    def prefill(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.out = self._generate(tokens, 1, return_logits_vocab=True)

    def step(self, token: int) -> None:
        raise NotImplementedError("CTranslate2 goes on with its own tokens: see decode")

    def logits(self) -> np.ndarray:
        return np.asarray(self.out.logits[0][-1], dtype=np.float32)

    def logits_after(self, tokens: list[int], steps: int) -> np.ndarray:
        """With steps, all tokens are run one at a time: CTranslate2 can force that, not a part."""
        self.prefill(tokens)
        if steps:
            options = {"return_logits_vocab": True, "include_prompt_in_result": True}
            self.out = self._generate(tokens, len(tokens), **options)
        return self.logits()

    def decode(self, count: int) -> None:
        """The first call runs the prompt too: it is the untimed one."""
        if not self.running:
            self.running = True
            threading.Thread(target=self._go_on, daemon=True).start()
        self.asked.release(count)
        for _ in range(count):
            if not self.made.acquire(timeout=600):
                raise RuntimeError("CTranslate2 made no token in ten minutes")

    def _go_on(self) -> None:
        self.asked.acquire()
        self._generate(self.tokens, self.room, callback=self._after_a_token)

    def _after_a_token(self, result: object) -> bool:
        self.made.release()
        self.asked.acquire()
        return False

    def _generate(self, tokens: list[int], count: int, **options: object) -> object:
        """Greedy, exactly `count` tokens."""
        options = {"include_prompt_in_result": False, "end_token": [], **options}
        words = [word(token) for token in tokens]
        (result,) = self.model.generate_batch(
            [words], max_length=count, min_length=count, **options
        )
        return result
