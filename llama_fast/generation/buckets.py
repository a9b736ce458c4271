"""Captured decode steps that outlive a generation: one for each bucket of batch sizes.

Capturing a step takes about as long as decoding tens of tokens, and a graph is bound to the memory
it was captured with. So on a GPU a model keeps its cache and the steps captured on it, and the next
generation finds them: a batch of 3 replays the graph of 4 rows, the last of which holds nothing.
The buckets share one cache, each its first rows. On a CPU a step costs nothing to capture, and
every generation makes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..dispatch import launch_settings
from ..model import Llama
from ..nn.kv_cache import KVCache
from .decode import Capturer, CudaGraphs, DecodeStep, is_plain

# Then multiples of the last, the rows that one tile of the kernels holds.
SMALL = (1, 2, 4, 8, 16)
# A cache has a multiple of these, so that texts of other lengths find it large enough.
SLOTS = 256


def bucket(batch: int) -> int:
    """The rows of the step that decodes `batch` sequences: 3 → 4, 17 → 32."""
    return next((rows for rows in SMALL if rows >= batch), -(-batch // SMALL[-1]) * SMALL[-1])


class Steps:
    """A cache and the decode steps captured on it, by bucket. They hold as long as the model's
    weights lie where they lay and nothing else that a replay would repeat has changed."""

    def __init__(
        self,
        model: Llama,
        batch: int,
        slots: int,
        kv_cache: str | None,
        capture: Callable[[KVCache], Capturer | None],
    ) -> None:
        room = min(model.config.max_seq_len, -(-slots // SLOTS) * SLOTS)
        self.cache = model.new_cache(bucket(batch), room, kv_cache)
        self.kv_cache = kv_cache
        self.state = _state(model)
        self.capture = capture
        self.by_rows: dict[int, DecodeStep] = {}

    def serve(self, model: Llama, batch: int, slots: int, kv_cache: str | None) -> bool:
        room = self.cache.batch >= bucket(batch) and self.cache.max_seq_len >= slots
        return room and self.kv_cache == kv_cache and self.state == _state(model)

    def of(self, model: Llama, batch: int) -> DecodeStep:
        rows = bucket(batch)
        if rows not in self.by_rows:
            cache = self.cache.first(rows)
            self.by_rows[rows] = DecodeStep(model, cache, self.capture(cache))
        return self.by_rows[rows]


_kept: weakref.WeakKeyDictionary[Llama, Steps] = weakref.WeakKeyDictionary()


def forget_steps(model: Llama) -> None:
    """Gives back the memory of the cache and the graphs that the model has kept, if any."""
    _kept.pop(model, None)


@contextmanager
def borrow_step(
    model: Llama,
    batch: int,
    slots: int,
    capture: Callable[[KVCache], Capturer | None] | None = None,
    kv_cache: str | None = None,
) -> Iterator[DecodeStep]:
    """A decode step for `batch` sequences of at most `slots` tokens; `step.cache` has at least so
    many rows and slots. Inside the block it is nobody else's: another generation of the same model
    at the same time gets one of its own. An exception leaves nothing behind.

    capture   makes what captures steps on a cache; None: CUDA graphs on a GPU, and elsewhere
              nothing is kept
    kv_cache  what the cache is stored as: see `Llama.new_cache`
    """
    if capture is None and torch.device(model.device).type != "cuda":
        yield DecodeStep(model, model.new_cache(batch, slots, kv_cache))
        return
    if capture is None:
        capture = _cuda_graphs(model)
    steps = _kept.pop(model, None)
    if steps is None or not steps.serve(model, batch, slots, kv_cache):
        steps = None  # its memory is free before the new one is made
        steps = Steps(model, batch, slots, kv_cache, capture)
    ended = False
    try:
        yield steps.of(model, batch)
        ended = True
    except GeneratorExit:  # whoever reads the stream has had enough
        ended = True
        raise
    finally:
        if ended:
            _kept[model] = steps


def _cuda_graphs(model: Llama) -> Callable[[KVCache], Capturer | None]:
    return lambda cache: CudaGraphs(cache.lengths.device) if is_plain(model) else None


def _state(model: Llama) -> tuple:
    """What a captured step depends on besides its cache."""
    addresses = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    return addresses, model.dtype, is_plain(model), launch_settings()


@contextmanager
def filled(step: DecodeStep, padding: Sequence[int]) -> Iterator[KVCache]:
    """Empties the step's cache. Inside the block, the cache of the first len(padding) rows, for
    their prompts; row b expects `padding[b]` tokens of padding first."""
    whole = step.cache
    whole.reset()
    cache = whole.first(len(padding)) if len(padding) < whole.batch else whole
    cache.reset(padding)
    yield cache
    if cache is not whole:
        whole.take_lengths(cache)
