"""A row becomes ids, and of each id whether the model is trained to write it.

The masks of dialogs are made message by message, from the format that encodes them: nothing is
searched in the ids, so they are right for every template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ..errors import DataError
from ..tokenizer import ChatFormat, TemplateFormat, Tokenizer
from ..utils.sequences import common_beginning
from .formats import Completion, Dialog, Document, Preference, Row

TRAIN_ON = ("answers", "last", "all")
PREFERENCES = "preferences"  # rows of two answers, each of which is one example
Chat = ChatFormat | TemplateFormat
# A chat format, or what makes it when the first dialog comes; None: there is none.
ChatOrMaker = Chat | Callable[[], Chat | None] | None


class Example(NamedTuple):
    """ids; mask: which of them are trained; whether the row may be cut anywhere."""

    ids: list[int]
    mask: list[bool]
    may_be_cut: bool


def examples(
    row: Row, tokenizer: Tokenizer, chat: Chat | None, train_on: str
) -> tuple[Example, ...]:
    """Returns the examples that a row is: one, or with PREFERENCES two, the chosen answer and the
    rejected one. Raises as `example` does, and for a row that does not prefer one of two answers.
    """
    if train_on != PREFERENCES:
        return (example(row, tokenizer, chat, train_on),)
    if not isinstance(row, Preference):
        raise DataError(
            "the row is no preference: prompt, chosen and rejected are needed; a training on "
            "answers alone takes it (leave --dpo out)"
        )
    chosen, rejected = (
        example(answer, tokenizer, chat, "answers") for answer in _after_the_prompt(row)
    )
    if not (any(chosen.mask) and any(rejected.mask)):
        raise DataError("one of the two dialogs has no answer where it differs from the other")
    if chosen.ids == rejected.ids:
        raise DataError("the chosen and the rejected answer are the same, so none is preferred")
    return chosen, rejected


def has_dialog(row: Row) -> bool:
    """Whether a chat format is needed to encode the row."""
    if isinstance(row, Preference):
        return has_dialog(row.chosen) or has_dialog(row.rejected)
    return isinstance(row, Dialog)


def _after_the_prompt(row: Preference) -> tuple[Dialog | Completion, Dialog | Completion]:
    """Both answers. Of dialogs only the messages in which they differ are answers: what both begin
    with is the prompt, whatever the file calls it."""
    chosen, rejected = row.chosen, row.rejected
    if not (isinstance(chosen, Dialog) and isinstance(rejected, Dialog)):
        return chosen, rejected
    # Where one is the other's beginning, or they are the same, its last message is an answer.
    shorter = min(len(chosen.messages), len(rejected.messages))
    common = min(common_beginning(chosen.messages, rejected.messages), shorter - 1)
    return tuple(replace(answer, first=max(answer.first, common)) for answer in (chosen, rejected))


def example(row: Row, tokenizer: Tokenizer, chat: Chat | None, train_on: str) -> Example:
    """Returns a row's ids and mask.

    train_on: "answers" trains the content of every answer, calls included, and the token that ends
    it; "last" that of the last one alone; "all" every token. A plain text is trained whole, between
    the tokens that begin and end a text; of a completion its prompt is not trained by "answers" and
    "last". Raises DataError, without a place, PromptError and TokenizerError for what cannot be
    encoded.
    """
    if isinstance(row, Document):
        ids = _between(tokenizer, tokenizer.encode(row.text))
        return Example(ids, [True] * len(ids), True)
    if isinstance(row, Completion):
        prompt = _between(tokenizer, tokenizer.encode(row.prompt), end=False)
        answer = _between(tokenizer, tokenizer.encode(row.completion), begin=False)
        trained = train_on == "all"
        return Example(prompt + answer, [trained] * len(prompt) + [True] * len(answer), False)
    if not isinstance(row, Dialog):
        raise DataError(
            "the row is a preference, which DPO trains on: give --dpo, or read it by read_pairs"
        )
    if chat is None:
        raise DataError("the row is a dialog, and this vocabulary has no chat format; give chat=")
    encoded = chat.encode(row.messages, tools=row.tools or None, add_generation_prompt=False)
    if train_on == "all":
        return Example(encoded.ids, [True] * len(encoded.ids), False)
    answers = [
        n
        for n, message in enumerate(row.messages)
        if message.role == "assistant" and n >= row.first
    ]
    answers = answers[-1:] if train_on == "last" else answers
    if unmarked := sorted(set(answers) & set(encoded.unmarked)):
        raise DataError(
            f"the chat template writes message {unmarked[0] + 1} so that its content cannot be "
            'told from the rest; use train_on="all", or a ChatFormat'
        )
    return Example(encoded.ids, encoded.content_of(answers), False)


def _between(
    tokenizer: Tokenizer, ids: list[int], *, begin: bool = True, end: bool = True
) -> list[int]:
    """The ids between the begin and the end of a text, where the vocabulary has such tokens."""
    before = [tokenizer.bos_id] if begin and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if end and tokenizer.eos_id is not None else []
    return [*before, *ids, *after]
