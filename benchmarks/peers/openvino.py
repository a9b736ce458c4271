"""OpenVINO GenAI: a GGUF, which it makes a graph of its own of when it opens it.

Requests go to a `ContinuousBatchingPipeline`, which makes a token a step and so can take turns;
`LLMPipeline` makes all of an answer in one call. The CPU plugin's defaults stay: float arithmetic
in bfloat16 (where the CPU has it), activations rounded to 8 bits in groups of 32 before quantised
weights, and a KV cache of 8 bits, where ours is bfloat16. Its reader of GGUF knows no bfloat16.
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
        self._make(1)

    def step(self, token: int) -> None:
        raise NotImplementedError("OpenVINO GenAI goes on with its own tokens: see decode")

    def logits(self) -> np.ndarray:
        raise NotImplementedError("OpenVINO GenAI gives log probabilities alone")

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Those of all tokens but the first, each after those before it, (T-1,) float32."""
        self.tokens = tokens
        self._start(1, echo=True, logprobs=1)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        (output,) = self.request.read_all()
        return np.array(output.generated_log_probs[1 : len(tokens)], dtype=np.float32)

    def decode(self, count: int) -> None:
        """The first call runs the prompt too: it is the untimed one."""
        if not self.running:
            self.running = True
            self._start(self.room)
        self._make(count)

    def _start(self, count: int, **options: object) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=count, ignore_eos=True, do_sample=False, **options
        )
        ids = openvino.Tensor(np.array([self.tokens], dtype=np.int64))
        self.request = self.pipeline.add_request(0, ids, config)  # it ends when that is dropped

    def _make(self, count: int) -> None:
        """Steps until there are `count` tokens more. Raises RuntimeError where there are none."""
        while count > 0:
            if not self.pipeline.has_non_finished_requests():
                raise RuntimeError(f"OpenVINO GenAI has stopped, {count} tokens too early")
            self.pipeline.step()
            if self.request.can_read():
                (output,) = self.request.read().values()
                count -= len(output.generated_ids)
