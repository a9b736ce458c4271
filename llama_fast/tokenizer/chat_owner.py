"""Whose each part of a rendered dialog is, found by rendering it message by message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PromptError
from .chat_encoded import Owner

Render = Callable[[int, bool], str]
EndsAt = Callable[[str, int, int], int | None]


class Span(NamedTuple):
    """Characters start … end-1 of a rendered dialog, and whose they are."""

    start: int
    end: int
    owner: Owner


def spans(
    whole: str,
    messages: Sequence[Mapping[str, Any]],
    render: Render,
    ends_at: EndsAt,
) -> tuple[list[Span], list[int]]:
    """Returns the spans of a rendered dialog, which cover it, and the assistant's messages whose
    content could not be found.

    render(n, asks): the first n messages as text, `asks` with the header of an answer.
    ends_at(text, start, stop): where the first token that ends a message ends, if there is one.
    """
    borders = [0, *(_border(whole, render, n) for n in range(1, len(messages)))]
    last = _border(whole, render, len(messages))
    stop = len(whole) if last is None else last
    found: list[Span] = []
    unmarked: list[int] = []
    start = 0
    for n, message in enumerate(messages):
        after = [border for border in borders[n + 1 :] if border is not None]
        end = after[0] if after else stop
        known = borders[n] is not None
        start = borders[n] if known else start
        joined = n + 1 < len(messages) and borders[n + 1] is None
        if message["role"] != "assistant":
            if joined:  # its text cannot be told from the next message's, whose it becomes
                continue
            content = _content(whole, start, end, message, ends_at)
        else:
            content = _answer(whole, start, end, n, render, ends_at) if known else None
            if joined:  # only a token can tell its end from the next message
                content = content if content and content[1] < end else None
            elif content is None and known and not message.get("tool_calls"):
                content = _content(whole, start, end, message, ends_at)
            if content is None:
                unmarked.append(n)
            if joined:
                # What follows the answer is the next message's.
                end = content[1] if content else start
        a, b = content or (end, end)
        found += [Span(start, a, Owner(n, False)), Span(a, b, Owner(n, True))]
        found.append(Span(b, end, Owner(n, False)))
        start = end
    found.append(Span(start, len(whole), Owner(-1, False)))
    return [span for span in found if span.end > span.start], unmarked


def _border(whole: str, render: Render, n: int) -> int | None:
    """Where the first n messages end; None where the template writes them otherwise, or not at all,
    when no more follow."""
    try:
        before = render(n, False)
    except PromptError:
        return None
    return len(before) if whole.startswith(before) else None


def _answer(
    whole: str, start: int, end: int, n: int, render: Render, ends_at: EndsAt
) -> tuple[int, int] | None:
    """The assistant's content: what follows the text that asks for it."""
    try:
        asking = render(n, True)
    except PromptError:
        return None
    if len(asking) <= start or len(asking) > end or not whole.startswith(asking):
        return None  # the template has no header to ask with, or another
    return len(asking), ends_at(whole, len(asking), end) or end


def _content(
    whole: str, start: int, end: int, message: Mapping[str, Any], ends_at: EndsAt
) -> tuple[int, int] | None:
    """A message's content where the template wrote it, without the blanks around it."""
    content = message["content"]
    core = content.strip() if isinstance(content, str) else ""
    at = whole.rfind(core, start, end) if core else -1
    if at < 0:
        return None
    after = at + len(core)
    stop = ends_at(whole, after, end)
    return at, stop if stop is not None and message["role"] == "assistant" else after


def owners(sizes: Sequence[int], parts: Sequence[tuple[int, Owner]]) -> list[Owner]:
    """Returns the owner of each token, given the tokens' sizes in bytes and the owners of the bytes
    one after another. A token across a border is content if any of it is."""
    if len(parts) == 1:
        return [parts[0][1]] * len(sizes)
    found: list[Owner] = []
    part, left = 0, parts[0][0]
    for size in sizes:
        whose = None
        while True:
            while left == 0 and part + 1 < len(parts):
                part += 1
                left = parts[part][0]
            if whose is None or (parts[part][1].content and not whose.content):
                whose = parts[part][1]
            taken = min(size, left)
            size, left = size - taken, left - taken
            if size == 0 or (left == 0 and part + 1 == len(parts)):
                break
        found.append(whose)
    return found
