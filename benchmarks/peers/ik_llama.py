"""ik_llama.cpp, a fork of llama.cpp with CPU kernels of its own, through ik-llama-cpp-python.

Reads the GGUF files that llama.cpp made. As there, activations are rounded to 8 bits before a
quantised matrix, and the KV cache is float16. Weights are repacked into interleaved rows when they
are loaded, which rules out mapping the file; llama.cpp repacks q4_0 by itself.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from ik_llama_cpp import _ctypes_api as ik

from .baseline import Baseline


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _nothing(level: int, text: bytes, user_data: object) -> None:
    pass


class IkLlama(Baseline):
    def __init__(self, gguf: Path, threads: int, context: int) -> None:
        ik._lib.llama_log_set(_nothing, None)  # it has no binding; a page for every model otherwise
        ik.llama_backend_init()
        params = ik.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap, params.repack_tensors = False, True
        self.model = ik.llama_model_load_from_file(str(gguf).encode(), params)
        if not self.model:
            raise RuntimeError(f"ik_llama cannot load {gguf}")
        self.vocab_size = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self.model))
        params = ik.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        self.context = ik.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"ik_llama cannot start a context of {context} tokens")

    def prefill(self, tokens: list[int]) -> None:
        ik.llama_kv_cache_clear(self.context)
        self.length = 0
        self._run(tokens)

    def step(self, token: int) -> None:
        self._run([token])

    def logits(self) -> np.ndarray:
        pointer = ik.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))

    def _run(self, tokens: list[int]) -> None:
        """Positions follow those before; without flags of its own a batch has logits for its last
        token alone."""
        batch = ik.llama_batch(
            n_tokens=len(tokens),
            token=(ik.llama_token * len(tokens))(*tokens),
            all_pos_0=self.length,
            all_pos_1=1,
            all_seq_id=0,
        )
        if failed := ik.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens failed (code {failed})")
        self.length += len(tokens)
