"""Text from a model: one prefill for prompts of any lengths, then a token a step for every row.

A row's tokens depend on its prompt, the sampling and its seed; not on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..config import LlamaConfig
from ..errors import PromptError
from ..model import Llama
from ..nn.kv_cache import cache_dtype
from ..tokenizer import StreamDecoder, Tokenizer
from .engine import Engine
from .sampling import Sampling, logprobs


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


Prompt = str | Sequence[int]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
    kv_cache: str | None = None,
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
        kv_cache=kv_cache,
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
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
    kv_cache: str | None = None,
) -> Iterator[Chunk]:
    """Yields a Chunk for each new token of each prompt, as they are made.

    prompts         one text or list of token ids, or several. A text is preceded by
                    begin_of_text, and special tokens spelled in it stay ordinary text
    max_new_tokens  at most so many; fewer where the context ends
    temperature, top_p, top_k   see `llama_fast.generation.sampling.Sampling`
    seed            of every row's own generator, or one seed a row; None: a fresh one
    stop            texts that end a row; they are left out of its text
    kv_cache        "int8" stores keys and values in about half the memory, and rounds them; None:
                    in the model's dtype

    Raises PromptError for an empty prompt, one that fills the context, token ids that the model
    does not have, or values out of range, and ConfigError for another kv_cache.
    """
    prompts = encode_prompts(tokenizer, prompts)
    rows = _Rows(model, tokenizer, prompts, max_new_tokens, seed, stop, kv_cache)
    return rows.run(Sampling(temperature, top_p, top_k))


def encode_prompts(tokenizer: Tokenizer, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt; a single text or list of ids counts as one prompt."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        prompts = [prompts]
    return [
        tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]


def check_prompts(
    config: LlamaConfig, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]
) -> None:
    """Raises PromptError for prompts that a model of this config cannot continue."""
    context = config.max_seq_len
    if not prompts:
        raise PromptError("no prompt was given; give a text, or a list of texts")
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
        if not prompt or list(prompt) == [tokenizer.bos_id]:
            raise PromptError(f"{name} is empty; give some text to continue")
        if len(prompt) >= context:
            raise PromptError(
                f"{name} has {len(prompt)} tokens and the model's context is {context}, "
                "the answer included; shorten it"
            )
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise PromptError(
                f"{name} has token ids outside 0 … {config.vocab_size - 1}; "
                "this tokenizer does not belong to this model"
            )


class _Rows:
    """The state of a batch while it is generated."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        max_new_tokens: int,
        seed: int | Sequence[int] | None,
        stop: Sequence[str],
        kv_cache: str | None,
    ) -> None:
        check_prompts(model.config, tokenizer, prompts)
        cache_dtype(kv_cache, model.dtype)
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        if isinstance(stop, str) or not all(stop):
            raise PromptError(f"stop is {stop!r}; it must be a list of texts that are not empty")
        self.model = model
        self.kv_cache = kv_cache
        self.prompts = prompts
        context = model.config.max_seq_len
        self.limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.stop_ids = frozenset(tokenizer.stop_ids)
        self.generators = _generators(seed, len(prompts))
        self.texts = [_Text(StreamDecoder(tokenizer, skip_special=True), stop) for _ in prompts]

    def run(self, sampling: Sampling) -> Iterator[Chunk]:
        slots = max(len(prompt) + n for prompt, n in zip(self.prompts, self.limits, strict=True))
        with Engine.acquire(self.model, len(self.prompts), slots, self.kv_cache) as engine:
            yield from self._decode(sampling, engine)

    def _decode(self, sampling: Sampling, engine: Engine) -> Iterator[Chunk]:
        counts = [0] * len(self.prompts)
        active = set(range(len(self.prompts)))
        logits = engine.prefill(self.prompts)
        while True:
            tokens = sampling.sample(logits, self.generators)
            scores = logprobs(logits, tokens).tolist()
            for index, token in enumerate(tokens.tolist()):
                if index not in active:
                    continue
                counts[index] += 1
                text, reason = self._finish(index, token, counts[index])
                if reason:
                    active.remove(index)
                    engine.free(index)
                yield Chunk(index, token, scores[index], text, reason)
            if not active:
                return
            logits = engine.step(tokens)

    def _finish(self, index: int, token: int, count: int) -> tuple[str, str | None]:
        """What to show after this token, and why the row ends with it, or None."""
        text = self.texts[index]
        if token in self.stop_ids:
            return text.flush(), "stop"
        shown = text.push(token)
        if text.stopped:
            return shown, "stop_string"
        if count == self.limits[index]:
            return shown + text.flush(), "length"
        return shown, None


class _Text:
    """The text of one row: whole characters only, and nothing of a stop string."""

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str]) -> None:
        self.decoder = decoder
        self.stop = tuple(stop)
        self.held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        self.held += self.decoder.push(token)
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
        return shown


def _generators(seed: int | Sequence[int] | None, rows: int) -> list[torch.Generator]:
    seeds = [seed] * rows if seed is None or isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise PromptError(f"{len(seeds)} seeds were given for {rows} prompts; give one each")
    generators = [torch.Generator() for _ in seeds]
    for generator, row_seed in zip(generators, seeds, strict=True):
        if row_seed is None:
            generator.seed()
        else:
            generator.manual_seed(row_seed)
    return generators
