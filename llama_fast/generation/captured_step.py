"""A decode step of a batch, captured and replayed: on a GPU as a CUDA graph, and on a CPU as a list
of launches. A step launches a hundred kernels or more, and many are shorter than the Python that
leads to them.

A captured step is given the same memory every time: tokens are copied to where it reads them,
lengths grow where they lie, and attention is given all slots of the cache, of which it reads those
below each row's length. So nothing is captured anew as the lengths grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..dispatch import keep_step_memory, observed, recorder
from ..errors import FallbackWarning, KernelError
from ..model import Llama
from ..nn.kv_cache import KVCache
from .snapshot import Snapshot


class Capturer(Protocol):
    """Something that records what a function does on the device."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs `step` as it will be captured, and returns its result."""

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `step` without running it → what replays it, and where its result will lie."""


# Makes a capturer for steps on a cache, or returns None for steps that are run as they are.
CaptureOn = Callable[[KVCache], Capturer | None]


class CudaGraphs:
    """Captures on a stream of its own, as CUDA asks for, and without regard to what other threads
    do meanwhile: an allocation of theirs is no part of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._memory: dict[Hashable, Tensor] = {}

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        # Its device first: to leave a stream makes a context on the device that was current.
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
            keep_step_memory(self._memory),
        ):
            result = step()
        current.wait_stream(self.stream)
        return result

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),  # torch.cuda.graph does not leave it after an error
            torch.cuda.graph(self._graph, stream=self.stream, capture_error_mode="thread_local"),
            keep_step_memory(self._memory),
        ):
            result = step()
        return self._replay, result  # with its memory

    def _replay(self) -> None:
        self._graph.replay()


class CapturedStep:
    """`step(model, tokens)`: appends tokens (B,T) int64 to the cache → logits (B,T,V) float32.

    T is the same in every step. The cache may have more rows than B: its first ones are taken, and
    the others take some tokens too. The logits are valid until the next step.

    The first step warms up, the second is captured, later ones are replays, as long as the model is
    what it was (`snapshot.py`): after a change the next step warms up anew. Where a capture fails,
    a FallbackWarning says why and the steps are run as they are. So they are where modules have
    hooks or do what this package does not know, since a replay would leave that out; on a backend
    that was asked for and has no capturer; and while something looks at calls, such as a mode or
    autocast.

    All of it runs without gradients. An exception leaves the cache as it was before the step. A
    model may keep its steps: they do not keep the model.

    own_logits  give this rank's: see `Llama.forward`
    capture  by default CUDA graphs or the recorder of the device's first backend
    """

    def __init__(
        self,
        cache: KVCache,
        T: int,
        own_logits: bool = False,
        capture: CaptureOn | None = None,
    ) -> None:
        self._capture_on = capture
        self._own = {"own_logits": True} if own_logits else {}
        self.cache = cache
        device = cache.lengths.device
        with torch.inference_mode(cache.lengths.is_inference()):
            self.tokens = torch.zeros(cache.batch, T, dtype=torch.int64, device=device)
        self.forget()

    def forget(self) -> None:
        """The next step warms up."""
        self._snapshot: Snapshot | None = None
        self.capturer: Capturer | None = None
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    def __call__(self, model: Llama, tokens: Tensor) -> Tensor:
        self.tokens[: len(tokens)].copy_(tokens)
        return self._step(model)[: len(tokens)]

    def _step(self, model: Llama) -> Tensor:
        run = partial(self._run, model)
        if observed():
            return run()
        if self._snapshot is None or not self._snapshot.holds(model, self.cache):
            self._look(model)
        if self.capturer is None:
            return run()
        lengths = self.cache.host_lengths
        self.cache.count(self.tokens.shape[1])
        try:
            return self._captured_step(run)
        except BaseException:
            self.forget()
            self.cache.truncate(lengths)
            raise

    def _run(self, model: Llama) -> Tensor:
        last_only = self.tokens.shape[1] == 1
        return model(self.tokens, cache=self.cache, last_only=last_only, **self._own)

    def _look(self, model: Llama) -> None:
        """Sees what the model is now, and decides whether its steps can be captured."""
        self.forget()
        self._snapshot = Snapshot(model, self.cache)
        if self._capture_on is not None:
            self.capturer = self._capture_on(self.cache)
        elif self._snapshot.plain:
            device = self.cache.lengths.device
            self.capturer = CudaGraphs(device) if device.type == "cuda" else recorder(device)

    def _captured_step(self, run: Callable[[], Tensor]) -> Tensor:
        if not self.warm:
            with self.cache.whole():
                logits = self.capturer.warm_up(run)
            self.warm = True
            return logits
        if self.replay is None and not self._capture(run):
            with self.cache.whole():
                return run()
        self.replay()
        return self.logits

    def _capture(self, run: Callable[[], Tensor]) -> bool:
        """Captures a step, which the device has not run yet."""
        try:
            with self.cache.whole():
                self.replay, self.logits = self.capturer.capture(run)
        except (RuntimeError, KernelError) as error:
            self.capturer = None
            warnings.warn(
                f"decoding runs step by step, because a step cannot be captured: {error}. "
                "An op that runs on the eager backend may be the reason: see llama-fast doctor",
                FallbackWarning,
                stacklevel=6,
            )
            return False
        return True
