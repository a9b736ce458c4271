"""One decode step of a batch: a token for every row → logits. It is captured and replayed, on a GPU
as a CUDA graph and on a CPU as a list of launches: a step launches a hundred kernels or more, and
many are shorter than the Python that leads to them.

A captured step is given the same memory every time: tokens are copied to where it reads them,
lengths grow where they lie, and attention is given all slots of the cache, of which it reads those
below each row's length. So nothing is captured anew as the lengths grow.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as global_hooks

from ..dispatch import recorder
from ..errors import FallbackWarning
from ..model import Llama
from ..nn.kv_cache import KVCache


class Capturer(Protocol):
    """Something that records what a function does on the device."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs `step` as it will be captured, and returns its result."""

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `step` without running it → what replays it, and where its result will lie."""


class CudaGraphs:
    """Captures on a stream of its own, as CUDA asks for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = step()
        current.wait_stream(self.stream)
        return result

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
            result = step()
        return graph.replay, result


class DecodeStep:
    """`step(tokens)`: appends tokens (B,) int64 to the cache → logits (B,V) float32. The cache may
    have more rows than B: its first ones are taken, and the others take some token too.

    The logits are valid until the next step. The first step warms up, the second is captured, later
    ones are replays; where a capture fails, a FallbackWarning says why and the steps are run as
    they are. So they are where modules have hooks or are not this package's, since a replay does
    not call them, and on a backend that was asked for and has no capturer.
    """

    def __init__(self, model: Llama, cache: KVCache, capturer: Capturer | None = None) -> None:
        device = cache.lengths.device
        if capturer is None and is_plain(model):
            capturer = CudaGraphs(device) if device.type == "cuda" else recorder(device)
        # A model may keep its steps: they must not keep the model.
        self._model = weakref.ref(model)
        self.cache = cache
        self.capturer = capturer
        self.tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens[: len(tokens)].copy_(tokens.unsqueeze(1))
        return self._step()[: len(tokens)]

    def _step(self) -> Tensor:
        if self.capturer is None:
            return self._run()
        if not self.warm:
            self.cache.count(1)
            self.warm = True
            with self.cache.whole():
                return self.capturer.warm_up(self._run)
        if self.replay is None and not self._capture():
            return self._run()
        self.cache.count(1)
        self.replay()
        return self.logits

    def _run(self) -> Tensor:
        return self._model()(self.tokens, cache=self.cache, last_only=True)[:, -1]

    def _capture(self) -> bool:
        """Captures a step, which the device has not run yet."""
        try:
            with self.cache.whole():
                self.replay, self.logits = self.capturer.capture(self._run)
        except RuntimeError as error:
            self.capturer = None
            warnings.warn(
                f"decoding runs step by step, because a step cannot be captured: {error}. "
                "An op that runs on the eager backend may be the reason: see llama-fast doctor",
                FallbackWarning,
                stacklevel=3,
            )
            return False
        return True


def is_plain(model: Llama) -> bool:
    """Whether a step does nothing in Python that a replay would have to repeat: modules of this
    package and torch's, without hooks."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return False
    return all(
        type(module).__module__.split(".")[0] in (__package__, "torch")
        and not (module._forward_hooks or module._forward_pre_hooks)
        for module in model.modules()
    )
