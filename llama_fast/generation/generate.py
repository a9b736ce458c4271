"""Text from a model: one prefill for prompts of any lengths, then a token a step for every row.

A row's tokens depend on its prompt, the sampling and its seed; not on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed.tensor_parallel import agreed
from ..errors import PromptError
from ..model import Llama
from ..nn.kv_cache import cache_dtype
from ..tokenizer import StreamDecoder, Tokenizer
from .arguments import (
    Prompt,
    check_prompts,
    encode_prompts,
    seeds,
    stop_texts,
    stop_token_ids,
    whole_number,
)
from .candidates import Drawer
from .engine import Engine
from .follow import acquire
from .grammar import Grammar, allowed_by
from .not_finite import not_finite
from .sampling import Sampling


@dataclass(frozen=True)
class Chunk:
    """One new token of one prompt, in a stream.

    text           what can be shown now: never a part of a character or of a stop string
    finish_reason  None while the row goes on; then "stop" (a stop token), "stop_string" or
                   "length" (max_new_tokens, or the end of the context)
    """

    index: int
    token: int
    logprob: float
    text: str
    finish_reason: str | None


@dataclass
class Completion:
    """What a prompt was continued with; a stop token ends `tokens`, but is not in `text`."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Iterable[str] | None = None,
    stop_ids: int | Iterable[int] | None = None,
    kv_cache: str | None = None,
    grammar: Grammar | None = None,
) -> list[Completion]:
    """Continues each prompt; see `stream` for the arguments. Returns one Completion a prompt."""
    prompts = encode_prompts(tokenizer, prompts)
    chunks = stream(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        kv_cache=kv_cache,
        grammar=grammar,
    )
    completions = [Completion() for _ in prompts]
    for chunk in chunks:
        completion = completions[chunk.index]
        completion.text += chunk.text
        completion.tokens.append(chunk.token)
        completion.logprobs.append(chunk.logprob)
        if chunk.finish_reason:
            completion.finish_reason = chunk.finish_reason
    return completions


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Iterable[str] | None = None,
    stop_ids: int | Iterable[int] | None = None,
    kv_cache: str | None = None,
    grammar: Grammar | None = None,
) -> Iterator[Chunk]:
    """Yields a Chunk for each new token of each prompt, as they are made.

    prompts         one text or list of token ids (also an array or a tensor), or several. A text
                    is preceded by begin_of_text, and special tokens spelled in it stay ordinary
                    text
    max_new_tokens  at most so many; fewer where the context ends
    temperature, top_p, top_k   see `llama_fast.generation.sampling.Sampling`
    seed            of every row's own generator, or one seed a row; None: a fresh one
    stop            texts that end a row; they are left out of its text. One may spell a special
                    token, such as "<|eot_id|>"
    stop_ids        tokens that end a row, besides those that the tokenizer and its folder name
                    (`tokenizer.stop_ids`)
    kv_cache        "int8" stores keys and values in about half the memory, and rounds them; None:
                    in the model's dtype
    grammar         what each answer must be: see `llama_fast.generation.grammar.Grammar`. A row
                    whose text is whole ends with "stop", without a stop token where nothing could
                    follow. Logprobs are the model's own, those of refused tokens included

    Tokens that the model has and the tokenizer has not (padding of the vocabulary) are never drawn.
    Raises PromptError for an empty prompt, one that fills the context, token ids that the model
    does not have, values out of range, or a grammar that cannot be met, and ConfigError for another
    kv_cache; and while the text is made, LogitsError where the logits are NaN or infinite, and
    PromptError where the grammar becomes too complex.
    """
    prompts = encode_prompts(tokenizer, prompts)
    rows = Rows(model, tokenizer, prompts, max_new_tokens, seed, stop, stop_ids, kv_cache, grammar)
    return rows.run(Sampling(temperature, top_p, top_k))


class Rows:
    """The state of a batch while it is generated."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        max_new_tokens: int,
        seed: int | Sequence[int] | None,
        stop: Iterable[str] | None,
        stop_ids: int | Iterable[int] | None,
        kv_cache: str | None,
        grammar: Grammar | None = None,
    ) -> None:
        check_prompts(model.config, tokenizer, prompts)
        cache_dtype(kv_cache, model.dtype)
        max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", 1)
        stop = stop_texts(stop)
        self.model = model
        self.known = tokenizer.vocab_size  # the model may have more ids, as padding
        self.drawer = Drawer(model, self.known)
        self.kv_cache = kv_cache
        self.prompts = prompts
        context = model.config.max_seq_len
        self.limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.stop_ids = stop_token_ids(stop_ids, model.config) | frozenset(tokenizer.stop_ids)
        row_seeds = seeds(seed, len(prompts))
        if None in row_seeds:  # every rank of a model over several draws the same
            fresh = agreed(model, [torch.Generator().seed() for _ in prompts])
            row_seeds = [a if b is None else b for a, b in zip(fresh, row_seeds, strict=True)]
        self.generators = [torch.Generator().manual_seed(row_seed) for row_seed in row_seeds]
        marks, stop = _mark_specials(tokenizer, stop)
        self.texts = [
            _Text(StreamDecoder(tokenizer, skip_special=True), stop, marks) for _ in prompts
        ]
        if not isinstance(grammar, Grammar | None):
            raise PromptError(f"grammar is {type(grammar).__name__}; give a Grammar or None")
        self.matchers = [grammar and grammar.matcher(tokenizer, self.stop_ids) for _ in prompts]

    def run(self, sampling: Sampling) -> Iterator[Chunk]:
        slots = max(len(prompt) + n for prompt, n in zip(self.prompts, self.limits, strict=True))
        with acquire(self.model, len(self.prompts), slots, self.kv_cache) as engine:
            yield from self.decode(sampling, engine, engine.prefill(self.prompts), engine.free)

    def decode(
        self,
        sampling: Sampling,
        engine: Engine,
        logits: Tensor,
        ended: Callable[[int], None],
    ) -> Iterator[Chunk]:
        """Draws from the logits after the prompts, and steps the engine with what was drawn until
        all rows have ended; `ended` is told of each."""
        samplings = [sampling] * len(self.prompts)
        counts = [0] * len(self.prompts)
        active = set(range(len(self.prompts)))
        while True:
            allowed = [allowed_by(m if n in active else None) for n, m in enumerate(self.matchers)]
            drawn = self.drawer.draw(logits, allowed, samplings, self.generators)
            tokens, scores = drawn.tokens, drawn.logprobs.tolist()
            for index, token in enumerate(tokens.tolist()):
                if index not in active:
                    continue
                counts[index] += 1
                if not math.isfinite(scores[index]):
                    what = f"token {counts[index]} of prompt {index}"
                    raise not_finite(self.model, self.drawer.whole(logits, [index])[0], what)
                text, reason = self.finish(index, token, counts[index])
                if reason:
                    active.remove(index)
                    ended(index)
                yield Chunk(index, token, scores[index], text, reason)
            if not active:
                return
            logits = engine.step(tokens)

    def finish(self, index: int, token: int, count: int) -> tuple[str, str | None]:
        """Takes the token that row `index` has drawn as its `count`-th. Returns what to show after
        it, and why the row ends with it, or None."""
        text, matcher = self.texts[index], self.matchers[index]
        if token in self.stop_ids:
            return text.flush(), "stop"
        if matcher is not None:
            matcher.push(token)
        shown = text.push(token)
        if text.stopped:
            return shown, "stop_string"
        if matcher is not None and matcher.ended:
            return shown + text.flush(), "stop"
        if count == self.limits[index]:
            return shown + text.flush(), "length"
        return shown, None


def _mark_specials(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[dict[int, str], list[str]]:
    """Returns a mark for each special token that a stop string spells, a character that no text has
    (a lone surrogate); and the stop strings, also with those marks in the place of the names."""
    marks: dict[int, str] = {}
    marked = list(stop)
    names = tokenizer.special_names
    for id_ in sorted(names, key=lambda id_: -len(names[id_])):
        if any(names[id_] in text for text in marked):
            marks[id_] = chr(0xD800 + len(marks))
            marked = [text.replace(names[id_], marks[id_]) for text in marked]
    return marks, [*stop, *marked]


class _Text:
    """The text of one row: whole characters only, and nothing of a stop string. Special tokens are
    no part of it; those that have a mark are there while stop strings are looked for."""

    def __init__(
        self, decoder: StreamDecoder, stop: Sequence[str], marks: Mapping[int, str]
    ) -> None:
        self.decoder = decoder
        self.stop = stop
        self.marks = marks
        self.unmarked = dict.fromkeys(map(ord, marks.values()))
        self.held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        self.held += self.marks.get(token) or self.decoder.push(token)
        ends = [position for s in self.stop if (position := self.held.find(s)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends))
        return self._release(len(self.held) - self._beginning())

    def flush(self) -> str:
        self.held += self.decoder.flush()
        return self._release(len(self.held))

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])),
            default=0,
        )

    def _release(self, count: int) -> str:
        shown, self.held = self.held[:count], self.held[count:]
        return shown.translate(self.unmarked)
