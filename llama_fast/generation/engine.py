"""The engine: a model, the KV cache of a batch, and the decode steps captured on it.

`generate` is written on it, and so may be whatever else makes text: several turns, drafts that are
verified, rows that end and are given other prompts.

    with Engine.acquire(model, batch=2, max_seq_len=256) as engine:
        logits = engine.prefill([[1, 2, 3], [4, 5]])  # (2, V), after each row's last token
        logits = engine.step(logits.argmax(-1))  # a token a row
        several = engine.step(drafts)  # (2, T) → (2, T, V)
        engine.truncate([6, 4])  # what of the drafts is kept

Rows of texts that come and go are set aside with `hold` and taken up again with `resume`, and
`step_first` steps only as many rows as there are texts.

Capturing a step takes about as long as decoding tens of tokens, and a graph is bound to the memory
it was captured with. So on a GPU a model keeps its cache and the steps captured on it, and the next
engine of the model finds them: a batch of 3 replays the graph of 4 rows, the last of which holds
nothing. All captured batch sizes share one cache, each its first rows. On a CPU a step costs
nothing to capture, and every engine makes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..dispatch import batch_invariant_on
from ..errors import PromptError, ShapeError
from ..model import Llama
from ..nn.kv_cache import KVCache
from .captured_step import CapturedStep, CaptureOn

# Batch sizes that steps are captured for; then multiples of the last, the rows that one tile of the
# kernels holds.
BATCH_SIZES = (1, 2, 4, 8, 16)
# A cache has a multiple of these, so that texts of other lengths find it large enough.
SLOTS = 256
# Tokens that a prefill takes at once, of each row and of all of them: they bound the memory of
# activations, however long the prompts are (docs/generation.md).
PREFILL_CHUNK, PREFILL_TOKENS = 1024, 4096
Steps = dict[tuple[int, bool], CapturedStep]
# The length of a row that is held: steps count up from it, and padding is neither stored nor seen.
AWAY = -(2**30)


def captured_batch_size(batch: int) -> int:
    """Returns the rows of the step that decodes `batch` sequences: 3 → 4, 17 → 32."""
    largest = BATCH_SIZES[-1]
    return next((rows for rows in BATCH_SIZES if rows >= batch), -(-batch // largest) * largest)


def prefill_chunk(batch: int) -> int:
    """Returns the tokens of each of `batch` rows that a prefill takes at once."""
    return max(1, min(PREFILL_CHUNK, PREFILL_TOKENS // batch))


class Engine:
    """Runs a model on `batch` sequences: the first rows of a cache, by default all of them.

    Rows end and begin at any time: `free` empties one, and `prefill` fills it again. A call that
    raises leaves every row as it was. Nothing records gradients; all of it runs in inference mode
    only where the cache was made in it, whatever the caller's mode.

    capture  makes what captures steps on the cache: see `CapturedStep`
    steps    those captured on the cache so far, by the tokens that each gives a row, and whether
             own logits
    own_logits  give the logits of a model over ranks as each rank has them: see `Llama.forward`
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        batch: int | None = None,
        *,
        capture: CaptureOn | None = None,
        steps: Steps | None = None,
        own_logits: bool = False,
    ) -> None:
        self.model = model
        self.own_logits = own_logits
        self.cache = cache
        self.batch = cache.batch if batch is None else batch
        self._capture_on = capture
        self._steps = {} if steps is None else steps
        self._free = {*range(self.batch, cache.batch)}
        self._held: dict[int, int] = {}  # rows set aside, and the tokens that each holds
        self._first: dict[int, tuple[KVCache, Steps]] = {}

    @classmethod
    @contextmanager
    def acquire(
        cls,
        model: Llama,
        batch: int,
        max_seq_len: int,
        kv_cache: str | None = None,
        *,
        capture: CaptureOn | None = None,
        own_logits: bool = False,
    ) -> Iterator[Engine]:
        """Gives an engine with empty rows, for `batch` sequences of at most `max_seq_len` tokens;
        its cache has at least so many rows and slots. Inside the block it is nobody else's: another
        one of the same model at the same time has a cache of its own. An exception leaves nothing
        behind.

        kv_cache  what the cache is stored as: see `Llama.new_cache`
        capture   None: CUDA graphs on a GPU, and elsewhere nothing is kept
        """
        if capture is None and torch.device(model.device).type != "cuda":
            cache = model.new_cache(batch, max_seq_len, kv_cache)
            yield cls(model, cache, own_logits=own_logits)
            return
        kept = _kept.pop(model, None)
        if kept is None or not kept.serves(model, batch, max_seq_len, kv_cache):
            kept = None  # its memory is free before the new one is made
            kept = _Kept(model, batch, max_seq_len, kv_cache)
        ended = False
        try:
            cache, steps = kept.of(batch)
            settings = {"capture": capture, "steps": steps, "own_logits": own_logits}
            engine = cls(model, cache, batch, **settings)
            engine.reset()
            yield engine
            ended = True
        except GeneratorExit:  # whoever reads the stream has had enough
            ended = True
            raise
        finally:
            if ended:
                _kept[model] = kept

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds; 0 for one that is free."""
        counted = self.cache.host_lengths[: self.batch]
        lengths = [0 if row in self._free else length for row, length in enumerate(counted)]
        return [self._held.get(row, length) for row, length in enumerate(lengths)]

    def prefill(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        first_row: int = 0,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Appends a prompt to each of the rows from `first_row` on, while the others stay as they
        are → the logits after the last token of each, (B,V) float32.

        Prompts may be of different lengths, or one tensor (B,T) int64. With `batch_invariant` the
        CPU kernels give a prompt the same bits whatever is beside it and wherever it is cut; this
        costs time where there are few tokens (docs/numerics.md). Raises PromptError for an empty
        prompt and where there is no room.
        """
        if not isinstance(prompts, Tensor):
            prompts = [list(prompt) for prompt in prompts]
        elif prompts.ndim != 2:
            raise ShapeError(f"tokens are {tuple(prompts.shape)}; they must be (B, T)")
        stop = first_row + len(prompts)
        if not 0 <= first_row < stop <= self.batch or not all(map(len, prompts)):
            raise PromptError(
                f"{len(prompts)} prompts were given for the rows from {first_row} on of "
                f"{self.batch}; give each row a prompt of one token or more"
            )
        rows = {*range(first_row, stop)}
        if aside := rows & self._held.keys():
            raise PromptError(f"the rows {sorted(aside)} are held; resume them before a prefill")
        self._empty(self._free & rows)
        before = self.cache.host_lengths
        device = self.cache.lengths.device
        alike = batch_invariant_on(device) if batch_invariant else nullcontext()
        try:
            with alike, torch.inference_mode(self.cache.lengths.is_inference()), torch.no_grad():
                logits = self._prefill(prompts, first_row)
        except BaseException:
            self.cache.truncate(before)
            raise
        self._free -= rows
        return logits

    def _prefill(self, prompts: Tensor | list[list[int]], first_row: int) -> Tensor:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        cache = self.cache.rows(first_row, first_row + len(prompts))
        if any(padding) and any(cache.host_lengths):
            # Padding has a place before a row's first token alone.
            parts = [self._prefill([x], first_row + i) for i, x in enumerate(prompts)]
            return torch.cat(parts)
        if any(padding):
            cache.reset(padding)
            prompts = [[0] * pad + x for pad, x in zip(padding, prompts, strict=True)]
        tokens = torch.as_tensor(prompts, device=self.cache.lengths.device)
        cache.ahead(longest)  # all of it has room, before any of it is computed
        own = {"own_logits": True} if self.own_logits else {}
        for chunk in tokens.split(prefill_chunk(len(prompts)), dim=1):
            logits = self.model(chunk, cache=cache, last_only=True, **own)
        self.cache.take_lengths(cache)
        return logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens (B,) int64, one a row → logits (B,V) float32; or T of each row, (B,T) →
        (B,T,V), after each of them.

        The logits are valid until the next step. What a row that is free is given does not matter.
        Steps of every T are captured apart; a text belongs into `prefill`. Raises PromptError where
        a row has no room.
        """
        several = tokens.ndim == 2
        rows = len(tokens) if tokens.numel() and tokens.ndim in (1, 2) else 0
        if rows != self.batch or tokens.dtype != torch.int64:
            raise ShapeError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be torch.int64 "
                f"({self.batch},) or ({self.batch}, T)"
            )
        T = tokens.shape[1] if several else 1
        with torch.inference_mode(self.cache.lengths.is_inference()), torch.no_grad():
            held = self.cache.host_lengths
            if any(held[row] + T > self.cache.max_seq_len for row in self._free):
                self._empty(self._free)
            logits = self.captured(T)(self.model, tokens.view(self.batch, T))
        return logits if several else logits[:, 0]

    def step_first(self, tokens: Tensor) -> Tensor:
        """As `step` with a token a row, of the first rows alone: tokens (n,) → logits (n,V). Steps
        of every n are captured apart."""
        n = len(tokens)
        if not 0 < n < self.batch:
            return self.step(tokens)
        if n not in self._first:
            self._first[n] = self.cache.first(n), {}
        part, steps = self._first[n]
        self.cache.give_lengths(part)
        settings = {"capture": self._capture_on, "own_logits": self.own_logits}
        engine = Engine(self.model, part, steps=steps, **settings)
        engine._free = {row for row in self._free if row < n}
        try:
            return engine.step(tokens)
        finally:
            self.cache.take_lengths(part)

    def captured(self, T: int = 1) -> CapturedStep:
        """Returns what `step` runs for T tokens of each row."""
        kind = T, self.own_logits
        if kind not in self._steps:
            self._steps[kind] = CapturedStep(self.cache, *kind, self._capture_on)
        return self._steps[kind]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Rolls each row b back to its first `lengths[b]` tokens. Raises ShapeError where it holds
        fewer."""
        lengths = list(lengths)
        if len(lengths) != self.batch or any(
            not 0 <= length <= held for length, held in zip(lengths, self.lengths, strict=True)
        ):
            raise ShapeError(
                f"rows that hold {self.lengths} tokens cannot be truncated to {lengths}; give each "
                "row's length, from 0 to what it holds"
            )
        self._held = {row: lengths[row] for row in self._held}
        lengths = [AWAY if row in self._held else n for row, n in enumerate(lengths)]
        self.cache.truncate([*lengths, *[0] * (self.cache.batch - self.batch)])

    def restore(self, row: int, held: Mapping[str, Tensor]) -> None:
        """Fills a row with what `KVCache.held` returned, and raises as `KVCache.restore` does."""
        row = range(self.batch)[row]
        with torch.inference_mode(self.cache.lengths.is_inference()), torch.no_grad():
            self.cache.restore(row, held)
        self._free.discard(row)
        self._held.pop(row, None)

    def hold(self, row: int) -> None:
        """Sets a row aside with its tokens: until `resume`, steps neither change nor read it."""
        row = range(self.batch)[row]
        if row not in self._held:
            self._held[row] = self.lengths[row]
            self._free.discard(row)
            self.cache.restart(row, AWAY)

    def resume(self, row: int, length: int) -> None:
        """Takes up a row that is held, with its first `length` tokens. Raises ShapeError where it
        holds fewer, or is not held."""
        row = range(self.batch)[row]
        if not 0 <= length <= self._held.get(row, -1):
            raise ShapeError(
                f"row {row} was to go on after {length} tokens, and "
                + (f"holds {self._held[row]}" if row in self._held else "is not held")
            )
        del self._held[row]
        self.cache.restart(row, length)

    def free(self, row: int) -> None:
        """Empties a row that has ended, so that it takes no more room."""
        row = range(self.batch)[row]
        self._free.add(row)
        if self._held.pop(row, None) is not None:
            self.cache.restart(row)
        self._empty({row})

    def reset(self) -> None:
        """Empties every row."""
        self._held = {}
        self._free = {*range(self.batch, self.cache.batch)}
        self.cache.reset()

    def _empty(self, rows: set[int]) -> None:
        """Takes what steps have appended to free rows too."""
        held = self.cache.host_lengths
        if any(held[row] for row in rows):
            self.cache.truncate([0 if row in rows else n for row, n in enumerate(held)])


class _Kept:
    """A cache and the steps captured on it, by batch size. What a step was captured from it checks
    itself; here the cache need only be such as the model would make."""

    def __init__(self, model: Llama, batch: int, slots: int, kv_cache: str | None) -> None:
        room = min(model.config.max_seq_len, -(-slots // SLOTS) * SLOTS)
        self.cache = model.new_cache(captured_batch_size(batch), room, kv_cache)
        self.form = _form(model, kv_cache)
        self._of: dict[int, tuple[KVCache, Steps]] = {}

    def serves(self, model: Llama, batch: int, slots: int, kv_cache: str | None) -> bool:
        rows = captured_batch_size(batch)
        room = self.cache.batch >= rows and self.cache.max_seq_len >= slots
        return room and self.form == _form(model, kv_cache)

    def of(self, batch: int) -> tuple[KVCache, Steps]:
        """Returns the rows that serve `batch` sequences, and the steps captured on them."""
        rows = captured_batch_size(batch)
        if rows not in self._of:
            self._of[rows] = self.cache.first(rows), {}
        return self._of[rows]


def _form(model: Llama, kv_cache: str | None) -> tuple:
    """What a cache depends on besides its size."""
    return model.config, model.dtype, model.device, kv_cache


_kept: weakref.WeakKeyDictionary[Llama, _Kept] = weakref.WeakKeyDictionary()


def forget_steps(model: Llama) -> None:
    """Gives back the memory of the cache and the graphs that the model has kept, if any."""
    _kept.pop(model, None)
