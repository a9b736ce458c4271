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

from ..dispatch import observed, recorder
from ..errors import FallbackWarning
from ..model import Llama
from ..nn.kv_cache import KVCache
from .snapshot import Snapshot


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
    ones are replays, as long as the model is what it was (`snapshot.py`): after a change the next
    step warms up anew. Where a capture fails, a FallbackWarning says why and the steps are run as
    they are. So they are where modules have hooks or do what this package does not know, since a
    replay would leave that out; on a backend that was asked for and has no capturer; and while
    something looks at calls, such as a mode or autocast.

    All of it runs without gradients and, whatever the caller's mode, in inference mode only if the
    cache was made in it. An exception leaves the cache as it was before the step.

    capture  what makes a capturer for steps on a cache, or None for steps that are run as they are;
             by default CUDA graphs or the recorder of the device's first backend
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        capture: Callable[[KVCache], Capturer | None] | None = None,
    ) -> None:
        # A model may keep its steps: they must not keep the model.
        self._model = weakref.ref(model)
        self._capture_on = capture
        self.cache = cache
        with torch.inference_mode(cache.lengths.is_inference()):
            self.tokens = torch.zeros(
                cache.batch, 1, dtype=torch.int64, device=cache.lengths.device
            )
        self.forget()

    def forget(self) -> None:
        """The next step warms up."""
        self._snapshot: Snapshot | None = None
        self.capturer: Capturer | None = None
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    @property
    def model(self) -> Llama | None:
        """None where it has gone."""
        return self._model()

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode(self.cache.lengths.is_inference()), torch.no_grad():
            self.tokens[: len(tokens)].copy_(tokens.unsqueeze(1))
            return self._step()[: len(tokens)]

    def _step(self) -> Tensor:
        if observed():
            return self._run()
        if self._snapshot is None or not self._snapshot.holds(self.model, self.cache):
            self._look()
        if self.capturer is None:
            return self._run()
        lengths = list(self.cache._lengths)
        self.cache.count(1)
        try:
            return self._captured_step()
        except BaseException:
            self.forget()
            self.cache._set_lengths(lengths)
            raise

    def _look(self) -> None:
        """Sees what the model is now, and decides whether its steps can be captured."""
        self.forget()
        self._snapshot = Snapshot(self.model, self.cache)
        if self._capture_on is not None:
            self.capturer = self._capture_on(self.cache)
        elif self._snapshot.plain:
            device = self.cache.lengths.device
            self.capturer = CudaGraphs(device) if device.type == "cuda" else recorder(device)

    def _captured_step(self) -> Tensor:
        if not self.warm:
            with self.cache.whole():
                logits = self.capturer.warm_up(self._run)
            self.warm = True
            return logits
        if self.replay is None and not self._capture():
            with self.cache.whole():
                return self._run()
        self.replay()
        return self.logits

    def _run(self) -> Tensor:
        return self.model(self.tokens, cache=self.cache, last_only=True)[:, -1]

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
                stacklevel=5,
            )
            return False
        return True
