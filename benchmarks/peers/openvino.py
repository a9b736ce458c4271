"""OpenVINO GenAI: a GGUF, which it makes a graph of its own of when it opens it.

The engine is that of `LLMPipeline(gguf, "CPU")`: on x86 this hands its requests to a
`ContinuousBatchingPipeline`, which makes a token a step and so can take turns. Its defaults stay:
8-bit weights with the groups of the file, repacked by oneDNN, activations rounded to 8 bits in
groups, and a KV cache of 8 bits, where ours is bfloat16. Its reader of GGUF knows no bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from .baseline import Baseline


class OpenVino(Baseline):
    def __init__(self, gguf: Path, threads: int, context: int) -> None:
        # As LLMPipeline has it: a prompt is one batch. Prefixes of earlier requests are not kept,
        # as the timed prompt is always the same.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = context
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(gguf), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.room, self.running = context, False

    def prefill(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self._start(1)
        self._finish()

    def step(self, token: int) -> None:
        raise NotImplementedError("OpenVINO GenAI goes on with its own tokens: see decode")

    def logits(self) -> np.ndarray:
        raise NotImplementedError("OpenVINO GenAI gives log probabilities alone")

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Those of all tokens but the first, each after those before it, (T-1,) float32."""
        self.tokens = tokens
        request = self._start(1, echo=True, logprobs=1)
        self._finish()
        (output,) = request.read_all()
        return np.array(output.generated_log_probs[1 : len(tokens)], dtype=np.float32)

    def decode(self, count: int) -> None:
        """The first call runs the prompt too: it is the untimed one."""
        if not self.running:
            self.running = True
            self._start(self.room)
        for _ in range(count):
            self.pipeline.step()

    def _start(self, count: int, **options: object) -> openvino_genai.GenerationHandle:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=count, ignore_eos=True, do_sample=False, **options
        )
        ids = openvino.Tensor(np.array([self.tokens], dtype=np.int64))
        return self.pipeline.add_request(0, ids, config)

    def _finish(self) -> None:
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
