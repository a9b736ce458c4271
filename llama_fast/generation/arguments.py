"""What generation is asked for, in whatever form it comes, in one plain form: prompts, stops, seeds
and numbers. What could be meant in two ways is refused: PromptError says what to give instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import LlamaConfig
from ..errors import PromptError
from ..tokenizer import Tokenizer

Prompt = str | Sequence[int]

UNORDERED = set | frozenset | Mapping


def encode_prompts(tokenizer: Tokenizer, prompts: Prompt | Iterable[Prompt]) -> list[list[int]]:
    """Returns the token ids of each prompt. A text is one prompt, and so are ids in a row: a list,
    an array or a tensor (T,), or what yields them. Anything that yields such prompts is several.

    Raises PromptError for anything else, such as None, or bytes, which could be either.
    """
    given = _in_order(prompts, "prompts")
    if isinstance(given, str) or (given and _is_id(given[0])):
        return [_encode(tokenizer, given, "the prompt")]
    return [_encode(tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(given)]


def _encode(tokenizer: Tokenizer, prompt: Any, name: str) -> list[int]:
    prompt = _in_order(prompt, name)
    if not isinstance(prompt, str):
        return _ids(prompt, name)
    return tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)


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
                f"{name} has token ids outside 0 … {config.vocab_size - 1}, the model's "
                "vocabulary; give those of its own tokenizer"
            )


def stop_texts(stop: Iterable[str] | None) -> list[str]:
    """Returns the texts that end a row; none for None."""
    given = () if stop is None else _plain(stop)
    one = not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping)
    texts = [given] if one else [*map(_plain, given)]
    if one or not all(isinstance(text, str) and text for text in texts):
        ids = "; token ids belong in stop_ids" if any(map(_is_id, texts)) else ""
        raise PromptError(
            f"stop is {_shown(stop)}; it must be a list of texts that are not empty{ids}"
        )
    return texts


def stop_token_ids(stop_ids: int | Iterable[int] | None, config: LlamaConfig) -> frozenset[int]:
    """Returns the ids that end a row besides the tokenizer's; none for None."""
    if stop_ids is None:
        return frozenset()
    ids = _ids([stop_ids] if _is_id(_plain(stop_ids)) else _items(stop_ids, "stop_ids"), "stop_ids")
    if not all(0 <= id_ < config.vocab_size for id_ in ids):
        raise PromptError(
            f"stop_ids is {_shown(stop_ids)}; the model's ids are 0 … {config.vocab_size - 1}"
        )
    return frozenset(ids)


def seeds(seed: int | Iterable[int | None] | None, rows: int) -> list[int | None]:
    """Returns a seed for each row; None for one that is to be drawn."""
    seed = _plain(seed)
    one = not isinstance(seed, Iterable) or isinstance(seed, str | bytes | UNORDERED)
    given = [seed] * rows if one else [*map(_plain, seed)]
    if len(given) != rows:
        raise PromptError(f"{len(given)} seeds were given for {rows} prompts; give one each")
    found = [x if x is None else whole_number(x, "seed", -(2**63)) for x in given]
    if any(x is not None and x >= 2**64 for x in found):
        raise PromptError(f"seed is {_shown(seed)}; it must be below 2**64")
    return found


def whole_number(value: Any, name: str, least: int, zero: str = "") -> int:
    """Returns it as an int. Raises PromptError where it is none, or below `least`; `zero` says what
    0 means."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise PromptError(f"{name} is {_shown(value)}; it must be {least}{zero} or more, and whole")
    return found


def number(value: Any, name: str) -> float:
    """Returns it as a float: Python's, numpy's or a tensor of one. Raises PromptError otherwise."""
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PromptError(f"{name} is {_shown(value)}; it must be a number") from None


def _in_order(value: Any, name: str) -> str | list:
    """As `_items`, of what has an order."""
    if isinstance(value, UNORDERED):
        raise PromptError(
            f"{name}: a {type(value).__name__} was given; give a text, token ids, or a list of such"
        )
    return _items(value, name)


def _items(value: Any, name: str) -> str | list:
    """A text as it is, and what anything else yields, with numbers of Python's own."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise PromptError(
            f"{name}: {type(value).__name__} were given, which may be a text or token ids; decode "
            "them to a str, or give the ids as a list"
        )
    value = _plain(value)
    if isinstance(value, str):
        return value
    if not isinstance(value, Iterable):
        raise PromptError(f"{name} is {_shown(value)}; give a text, token ids, or a list of such")
    return [*map(_plain, value)]


def _plain(value: Any) -> Any:
    """What an array or a tensor holds; anything else as it is."""
    if isinstance(value, memoryview) or not hasattr(value, "tolist"):
        return value
    return value.tolist()


def _ids(values: Any, name: str) -> list[int]:
    for value in values:
        if not _is_id(value):
            raise PromptError(f"{name}: {_shown(value)} is not a token id; ids are whole numbers")
    return [*map(operator.index, values)]


def _is_id(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
