"""Answers that keep to a form: a JSON schema, a regular expression or a Lark grammar.

    grammar = Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}})
    generate(model, tokenizer, "Her age as JSON: ", grammar=grammar)

Before each token is drawn, the tokens that the grammar does not allow next get the logit -inf, row
by row; the rest of the distribution stays as it is. What follows from the text so far is computed
by llguidance (the extra "grammar").
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PromptError
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# As Python writes JSON, and as Llama 3 was taught to. Blanks at will would let a model that does
# not know how to go on write nothing else.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What marks a token that is no text, in llguidance's vocabulary.
NO_TEXT = b"\xff"
SHOWN = 300  # characters of an error of llguidance


class Grammar:
    """What an answer must be. One may serve any number of prompts, models and tokenizers.

    kind: "json_schema", "regex" or "lark". Made by the class method of that name. Raises
    PromptError where llguidance is not installed; what the grammar itself has wrong is found by
    `matcher`, or by `check`.
    """

    def __init__(self, kind: str, source: str) -> None:
        self.kind = kind
        self._source = source

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that a schema describes, with a blank after each comma and colon. The keys of an
        object come in the schema's order. A schema may be given as JSON text."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return cls("json_schema", _matcher().grammar_from_json_schema(text, None, JSON_FORM))
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, PromptError):
                raise
            raise PromptError(f"the JSON schema is none: {_short(error)}") from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole, in Rust's syntax: no look-around and
        no references back."""
        return cls("regex", _matcher().grammar_from_regex(_text(pattern, "regex")))

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """Text of a context-free grammar in Lark's syntax, in llguidance's dialect; it begins at
        the rule `start`."""
        return cls("lark", _matcher().grammar_from_lark(_text(source, "lark")))

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises PromptError for a grammar that is malformed or cannot be met."""
        self.matcher(tokenizer, frozenset())

    def matcher(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> Matcher:
        """Returns the state of one new text. stop_ids: the tokens that may end it. Raises
        PromptError for a grammar that is malformed or cannot be met."""
        found = _matcher()(_vocabulary(tokenizer), self._source, log_level=0)
        if found.is_error():
            raise PromptError(
                f"the {self.kind} grammar cannot be used: {_short(found.get_error())}"
            )
        if not Matcher(found, tokenizer.vocab_size, frozenset()).allowed().any():
            raise PromptError(
                f"the {self.kind} grammar allows no text of this vocabulary but the empty one"
            )
        return Matcher(found, tokenizer.vocab_size, stop_ids)


class Matcher:
    """One text on its way through a grammar.

    ended: whether the text is whole and nothing may follow it.
    """

    def __init__(self, matcher: LLMatcher, known: int, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._known = known
        self._stop_ids = sorted(id_ for id_ in stop_ids if id_ < known)

    def allowed(self) -> np.ndarray:
        """Returns for each id of the tokenizer whether it may come next, (V,) bool: stop tokens
        where the text may end. Raises PromptError where llguidance gives up: the grammar is too
        complex for it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise PromptError(f"the grammar cannot go on: {_short(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        may_end = allowed[self._known]  # the end's own id, see _vocabulary
        allowed = allowed[: self._known]
        allowed[self._stop_ids] = may_end
        return allowed

    def push(self, token: int) -> None:
        """Takes a token that was allowed and is no stop token."""
        if not self._matcher.consume_token(token):
            raise PromptError(f"the grammar cannot go on: {_short(self._matcher.get_error())}")

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()


def allowed_by(matcher: Matcher | None) -> np.ndarray | None:
    """Returns which tokens of the vocabulary a grammar allows next, (V,) bool; None where there is
    no grammar. Raises PromptError where it allows none."""
    if matcher is None:
        return None
    allowed = matcher.allowed()
    if not allowed.any():
        raise PromptError("the grammar allows no token of this vocabulary here")
    return allowed


def masked(logits: Tensor, allowed: Sequence[np.ndarray | None], start: int = 0) -> Tensor:
    """Returns logits (B,V) in which row b has -inf for what allowed[b] leaves out; the very tensor
    where all rows may be anything. They may be those of some tokens, from `start` on."""
    if all(tokens is None for tokens in allowed):
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(allowed):
        if tokens is not None:
            refused = torch.from_numpy(~tokens[start : start + logits.shape[1]])
            logits[row].masked_fill_(refused.to(logits.device), -torch.inf)
    return logits


def _matcher() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise PromptError(
            "grammars need llguidance, which is not installed: pip install 'llama_fast[grammar]'"
        ) from None
    return LLMatcher


class _Words:
    """A vocabulary as llguidance asks for it. One more token than the tokenizer has is the end of
    a text: which stop tokens may stand for it, each text says itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        no_text = tokenizer.special_names.keys() | tokenizer.stop_ids
        words = [
            NO_TEXT + word if id_ in no_text else word
            for id_, word in enumerate(tokenizer.id_to_bytes)
        ]
        self.tokens = [*words, NO_TEXT + b"<|end of the grammar|>"]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.vocab_size
        self.special_token_ids = sorted([*no_text, tokenizer.vocab_size])
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


# What llguidance makes of a vocabulary takes up to seconds. By tokenizer, with the stop tokens that
# it was made from, which may be added to a tokenizer later.
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, tuple[frozenset[int], LLTokenizer]]
_vocabularies = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    with _making:
        made_of, found = _vocabularies.get(tokenizer, (None, None))
        if made_of != tokenizer.stop_ids:
            # A copy of the words alone: what is kept must not keep the tokenizer, its key.
            found = LLTokenizer(TokenizerWrapper(_Words(tokenizer)))
            _vocabularies[tokenizer] = frozenset(tokenizer.stop_ids), found
        return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} is {type(value).__name__}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has a lone surrogate (character {error.start}), which is not text; "
            "leave it out"
        ) from None
    return value


def _short(error: Any) -> str:
    text = " ".join(str(error).partition(" <state>")[0].split())  # then come a parser's insides
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
