"""A dialog with a model: messages, the ids that they are, and answers that stream.

Answers are kept as the very ids that the model made, since the same text encoded anew may be other
ids: so each turn of a dialog begins with the ids of the turn before, and a `Session` computes only
what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from ..tokenizer import ChatFormat, Message, TemplateFormat
from .session import Session

# Of the context, what an answer is given room for at least, where the dialog is long.
ANSWER_SHARE = 4


@dataclass(frozen=True)
class Turn:
    """A message, and the ids of an answer as the model made them; None for other messages."""

    message: Message
    made: tuple[int, ...] | None = None


class Chat:
    """A dialog over a session.

    format: how messages become ids. system: the first message, if any. tools: what the model is
    told that it may call (`ChatFormat.encode`).

    turns: all messages and the ids of the answers. dropped: how many messages have left because the
    context was full: the oldest user message and all that follows it up to the next user message
    leave together; the system message stays.
    """

    def __init__(
        self,
        session: Session,
        format: ChatFormat | TemplateFormat,
        *,
        system: str | None = None,
        tools: Iterable[Any] | None = None,
    ) -> None:
        self.session, self.format = session, format
        self.tools = list(tools or ())
        self.turns: list[Turn] = []
        self.dropped = 0
        self.finish_reason: str | None = None
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    @property
    def system(self) -> str | None:
        first = self.turns[0].message if self.turns else None
        return first.content if first and first.role == "system" else None

    def set_system(self, text: str | None) -> None:
        """Puts this in the place of the system message; None or nothing takes it out."""
        others = self.turns[self.system is not None :]
        self.turns = [Turn(Message("system", text)), *others] if text else others

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.turns = self.turns[: self.system is not None]
        self.dropped = 0

    def undo(self) -> str | None:
        """Takes back the last user message and what followed; returns its text, None where there
        is none."""
        for n in reversed(range(len(self.turns))):
            if self.turns[n].message.role == "user":
                text = self.turns[n].message.content
                del self.turns[n:]
                return text
        return None

    def add(self, message: Message) -> None:
        self.turns.append(Turn(message))

    def ids(self, *, answering: bool = True) -> list[int]:
        """Returns the ids of the dialog; with `answering` up to where an answer begins.

        An answer that was cut off is followed by the token that ends a message.
        """
        encoded = self.format.encode(
            self.messages, tools=self.tools, add_generation_prompt=answering
        )
        bodies: dict[int, list[int]] = {}
        for place, owner in enumerate(encoded.owner):
            if owner.content:
                bodies.setdefault(owner.message, []).append(place)
        ids, at = [], 0
        for n, turn in enumerate(self.turns):
            if turn.made is None or n not in bodies:
                continue
            first, last = bodies[n][0], bodies[n][-1]
            ids += encoded.ids[at:first]
            ids += turn.made
            if not self._ended(turn.made):
                ids.append(encoded.ids[last])
            at = last + 1
        return ids + encoded.ids[at:]

    def _ended(self, made: tuple[int, ...]) -> bool:
        return bool(made) and made[-1] in self.session.tokenizer.stop_ids

    def make_room(self, max_new_tokens: int) -> list[int]:
        """Drops the oldest turns until the dialog and an answer fit; returns the dialog's ids.

        Room is kept for max_new_tokens, or for a quarter of the context where that is less. Raises
        PromptError where the last turn alone is too long, and changes nothing then.
        """
        limit = self.session.max_seq_len
        room = min(max_new_tokens, limit // ANSWER_SHARE)
        before = self.turns
        while len(ids := self.ids()) + room > limit:
            head = int(self.system is not None)
            starts = [
                n for n, turn in enumerate(self.turns) if n > head and turn.message.role == "user"
            ]
            if not starts:
                if len(ids) < limit:  # less room than wished for
                    break
                self.turns = before
                raise PromptError(
                    f"the last turn has {len(ids)} tokens and the context is {limit}, the answer "
                    "included; shorten it, or allow a longer context (--max-seq-len)"
                )
            self.turns = self.turns[:head] + self.turns[starts[0] :]
        self.dropped += len(before) - len(self.turns)
        return ids

    def answer(self, *, max_new_tokens: int = 1024, **sampling: Any) -> Iterator[str]:
        """Yields the text of the assistant's answer as it is made, and adds the message to the
        dialog: with its calls, and what was made so far where the reader stops early or an error
        ends it. finish_reason then says why it ended ("stop", "stop_string", "length", or None).

        sampling: temperature and so on, as `generate` takes them. Raises PromptError where the
        dialog cannot be answered, and as `generate` does.
        """
        if not self.turns or self.turns[-1].message.role in ("assistant", "system"):
            raise PromptError(
                "there is no message to answer; add one of role user, or a tool's result"
            )
        ids = self.make_room(max_new_tokens)
        chunks = self.session.stream(ids, max_new_tokens=max_new_tokens, **sampling)
        return self._answer(chunks)

    def _answer(self, chunks: Iterator[Any]) -> Iterator[str]:
        made: list[int] = []
        self.finish_reason = None
        try:
            for chunk in chunks:
                made.append(chunk.token)
                self.finish_reason = chunk.finish_reason
                yield chunk.text
        finally:
            chunks.close()
            if made:
                message = self.format.decode_message(made, tools=self.tools)
                self.turns.append(Turn(message, tuple(made)))
