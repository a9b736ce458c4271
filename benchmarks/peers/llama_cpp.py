"""llama.cpp through llama-cpp-python's low-level API: a GGUF, memory-mapped, on the CPU."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np

from .baseline import Baseline

# llama.cpp's own choice first, then each of the other two.
FLASH_ATTENTION = {
    "llama.cpp's choice": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@llama_cpp.llama_log_callback
def _nothing(level: int, text: bytes, user_data: object) -> None:
    pass


def silence() -> None:
    """llama.cpp writes a page to stderr for every model that it opens."""
    llama_cpp.llama_log_set(_nothing, ctypes.c_void_p(0))


def system_info() -> str:
    """The instruction sets and libraries that this build of llama.cpp uses."""
    return llama_cpp.llama_print_system_info().decode().strip().rstrip("|").strip()


class LlamaCpp(Baseline):
    """Keeps llama.cpp's defaults: memory-mapped weights, repacked where it has a faster form for
    this CPU, a float16 KV cache, micro-batches of 512 tokens."""

    def __init__(self, gguf: Path, threads: int, context: int) -> None:
        silence()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self.threads, self.room = threads, context
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.context = None
        self.flash_attention("llama.cpp's choice")

    def flash_attention(self, choice: str) -> None:
        """Starts a new context with it, a key of FLASH_ATTENTION."""
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.room
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH_ATTENTION[choice]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot start a context with flash attention {choice}")

    def choose_flash_attention(self, tokens: list[int], count: int) -> str:
        """Tries each choice on a prompt and `count` tokens after it, keeps the fastest."""
        seconds = {}
        for choice in FLASH_ATTENTION:
            self.flash_attention(choice)
            self.prefill(tokens[:8])  # the first call in a context takes longer
            start = time.perf_counter()
            self.prefill(tokens)
            self.decode(count)
            seconds[choice] = time.perf_counter() - start
        fastest = min(seconds, key=seconds.__getitem__)
        self.flash_attention(fastest)
        return fastest

    def prefill(self, tokens: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._run(tokens)

    def step(self, token: int) -> None:
        self._run([token])

    def logits(self) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))

    def _run(self, tokens: list[int]) -> None:
        """Without positions and flags of its own, a batch goes on where the last one ended, and
        has logits for its last token alone."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(
            self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))
        )
        if failed:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens failed (code {failed})")
