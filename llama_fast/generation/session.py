"""One text that grows by turns: what stays of it is not computed again.

A dialog's next prompt begins with all that was said before. A session keeps the keys and values of
the tokens that it has seen, and of a new prompt it computes only what follows the longest beginning
that both have in common: a turn costs what is new in it.

    with Session(model, tokenizer, max_seq_len=8192) as session:
        for chunk in session.stream(ids):
            ...
        for chunk in session.stream([*ids, *answer, *more]):  # only `more` is prefilled
            ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..errors import PromptError
from ..model import Llama
from ..nn.kv_cache import cache_dtype
from ..tokenizer import Tokenizer
from ..utils.sequences import common_beginning
from .arguments import encode_prompts, whole_number
from .engine import Engine
from .follow import acquire
from .generate import Chunk, Rows
from .grammar import Grammar
from .sampling import Sampling
from .snapshot import Snapshot


class Session:
    """The tokens of one text, with their keys and values.

    max_seq_len: the most tokens that it holds, by default the model's context. kv_cache: as in
    `generate`. A context manager: on a GPU, the memory goes back to the model when it ends.

    tokens: those whose keys and values are held. prefilled: how many tokens of prompts have been
    computed so far, over all turns. What is held is dropped where the model is no longer what
    computed it: other modules, weights that were replaced or written in place, adapters. A write
    through `.data` leaves no trace; call `reset` after it.

    Raises PromptError for a max_seq_len beyond the model's context, ConfigError for another
    kv_cache.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int | None = None,
        kv_cache: str | None = None,
    ) -> None:
        context = model.config.max_seq_len
        given = context if max_seq_len is None else whole_number(max_seq_len, "max_seq_len", 2)
        if given > context:
            raise PromptError(
                f"max_seq_len is {given} and the model's context {context}; give at most that"
            )
        cache_dtype(kv_cache, model.dtype)
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len, self.kv_cache = given, kv_cache
        self.prefilled = 0
        self._turn = 0
        self._seen: list[int] = []  # what `tokens` is a beginning of
        self._made_by: tuple[Snapshot, list[tuple[int, int]]] | None = None
        self._stack = ExitStack()
        self._engine: Engine | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back. The next turn begins from nothing."""
        self._turn += 1
        self._stack.close()
        self._engine, self._seen, self._made_by = None, [], None

    def reset(self) -> None:
        """Forgets every token."""
        self._turn += 1
        if self._engine is not None:
            self._engine.reset()
        self._seen, self._made_by = [], None

    def restore(self, tokens: Sequence[int], held: Mapping[str, Tensor]) -> None:
        """Takes tokens with their keys and values, as `KVCache.held` returned them, in the place of
        what it holds. The caller answers for their being of this model. Raises ShapeError where
        they do not fit, and changes nothing then."""
        self.engine.restore(0, held)
        self._turn += 1
        self._seen = list(tokens)
        # The last token is computed again: a model may make tables of its own in its first call,
        # and is then no longer what is remembered here.
        self.engine.truncate([len(tokens) - 1])
        self.engine.prefill([[tokens[-1]]])
        self._remember()

    @property
    def engine(self) -> Engine:
        """The engine of one row that holds the text."""
        if self._engine is None:
            acquired = acquire(self.model, 1, self.max_seq_len, self.kv_cache)
            self._engine = self._stack.enter_context(acquired)
        return self._engine

    @property
    def tokens(self) -> list[int]:
        held = 0 if self._engine is None else self._engine.lengths[0]
        return self._seen[:held]

    def kept_of(self, ids: Sequence[int]) -> int:
        """Returns how many of the first tokens of `ids` need not be computed again."""
        if not self._is_of_this_model():
            return 0
        # The logits after the last token come from computing it.
        return common_beginning(self.tokens, list(ids)[:-1])

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        seed: int | None = None,
        stop: Iterable[str] | None = None,
        stop_ids: int | Iterable[int] | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[Chunk]:
        """Yields a Chunk for each new token, as `generate.stream` does, which explains the
        arguments and what is raised. The prompt is the whole text, from its beginning.

        An error, or a reader that stops early, loses nothing: what was computed is held. Once the
        next turn has begun, an earlier stream raises PromptError.
        """
        (ids,) = encode_prompts(self.tokenizer, prompt)
        rows = Rows(
            self.model,
            self.tokenizer,
            [ids],
            max_new_tokens,
            seed,
            stop,
            stop_ids,
            self.kv_cache,
            grammar,
        )
        if len(ids) >= self.max_seq_len:
            raise PromptError(
                f"the text has {len(ids)} tokens and the session holds {self.max_seq_len}, the "
                "answer included; shorten it, or give a larger max_seq_len"
            )
        rows.limits = [min(rows.limits[0], self.max_seq_len - len(ids))]
        return self._run(rows, ids, Sampling(temperature, top_p, top_k))

    def _run(self, rows: Rows, ids: list[int], sampling: Sampling) -> Iterator[Chunk]:
        self._turn += 1
        turn, engine, kept = self._turn, self.engine, self.kept_of(ids)
        engine.truncate([kept])
        self._seen = list(ids)
        logits = engine.prefill([ids[kept:]])
        self._remember()  # after the first call, in which a model may make tables
        self.prefilled += len(ids) - kept
        for chunk in rows.decode(sampling, engine, logits, ended=lambda row: None):
            self._seen.append(chunk.token)
            yield chunk
            if turn != self._turn:
                raise PromptError(
                    "another turn of this session has begun; a stream can be read to its end only "
                    "before that: give each text a session of its own"
                )

    def _remember(self) -> None:
        self._made_by = Snapshot(self.model, self.engine.cache), _versions(self.model)

    def _is_of_this_model(self) -> bool:
        if self._made_by is None:
            return False
        snapshot, versions = self._made_by
        return snapshot.holds(self.model, self.engine.cache) and versions == _versions(self.model)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Which tensors the weights are, and how often each was written; tensors made in inference mode
    do not count that."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(id(x), -1 if x.is_inference() else x._version) for x in tensors]
