"""A dialog as ids, each of which knows its message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Owner(NamedTuple):
    """What a token belongs to: the index of a message, -1 for none (the begin of the text, a system
    block that the format adds, the header of the answer to come); and whether it is content, the
    token that ends the message included, or header."""

    message: int
    content: bool


@dataclass(frozen=True)
class Encoded:
    """A dialog's ids, and the owner of each. unmarked: assistant messages (by index) whose content
    a chat template writes in such a way that it could not be told from the rest; always empty for a
    ChatFormat."""

    ids: list[int]
    owner: list[Owner]
    unmarked: tuple[int, ...] = ()

    def content_of(self, messages: Iterable[int]) -> list[bool]:
        """Returns for each id whether it is content of one of these messages."""
        wanted = frozenset(messages)
        return [owner.content and owner.message in wanted for owner in self.owner]
