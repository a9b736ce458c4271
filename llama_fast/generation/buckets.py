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

from ..model import Llama
from ..nn.kv_cache import KVCache
from .decode import Capturer, DecodeStep

# Then multiples of the last, the rows that one tile of the kernels holds.
SMALL = (1, 2, 4, 8, 16)
# A cache has a multiple of these, so that texts of other lengths find it large enough.
SLOTS = 256

CaptureOn = Callable[[KVCache], Capturer | None]


def bucket(batch: int) -> int:
    """The rows of the step that decodes `batch` sequences: 3 → 4, 17 → 32."""
    return next((rows for rows in SMALL if rows >= batch), -(-batch // SMALL[-1]) * SMALL[-1])


class Steps:
    """A cache and the decode steps captured on it, by bucket. What a step was captured from it
    checks itself; here the cache need only be such as the model would make."""

    def __init__(self, model: Llama, batch: int, slots: int, kv_cache: str | None) -> None:
        room = min(model.config.max_seq_len, -(-slots // SLOTS) * SLOTS)
        self.cache = model.new_cache(bucket(batch), room, kv_cache)
        self.form = _form(model, kv_cache)
        self.by_rows: dict[int, DecodeStep] = {}

    def serve(self, model: Llama, batch: int, slots: int, kv_cache: str | None) -> bool:
        room = self.cache.batch >= bucket(batch) and self.cache.max_seq_len >= slots
        return room and self.form == _form(model, kv_cache)

    def of(self, model: Llama, batch: int, capture: CaptureOn | None) -> DecodeStep:
        rows = bucket(batch)
        if rows not in self.by_rows:
            self.by_rows[rows] = DecodeStep(model, self.cache.first(rows), capture)
        return self.by_rows[rows]


def _form(model: Llama, kv_cache: str | None) -> tuple:
    """What a cache depends on besides its size."""
    return model.config, model.dtype, model.device, kv_cache


_kept: weakref.WeakKeyDictionary[Llama, Steps] = weakref.WeakKeyDictionary()


def forget_steps(model: Llama) -> None:
    """Gives back the memory of the cache and the graphs that the model has kept, if any."""
    _kept.pop(model, None)


@contextmanager
def borrow_step(
    model: Llama,
    batch: int,
    slots: int,
    capture: CaptureOn | None = None,
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
    steps = _kept.pop(model, None)
    if steps is None or not steps.serve(model, batch, slots, kv_cache):
        steps = None  # its memory is free before the new one is made
        steps = Steps(model, batch, slots, kv_cache)
    ended = False
    try:
        yield steps.of(model, batch, capture)
        ended = True
    except GeneratorExit:  # whoever reads the stream has had enough
        ended = True
        raise
    finally:
        if ended:
            _kept[model] = steps


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
