"""One exchange of a chat: a message, the answer as it is made, and the calls of tools in it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..errors import LogitsError
from .chat_screen import Screen
from .chat_tools import Tools, shown
from .terminal import note, size

if TYPE_CHECKING:
    from ..generation.chat import Chat
    from ..generation.session import Session

ROUNDS = 8  # of calls that follow one message


class Talk:
    """Answers messages on a screen, and runs the tools that answers call."""

    def __init__(
        self,
        chat: Chat,
        tools: Tools,
        sampling: dict[str, Any],
        max_new_tokens: int,
        *,
        yes: bool = False,
        quiet: bool = False,
    ) -> None:
        self.chat, self.tools = chat, tools
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.yes, self.quiet = yes, quiet
        self.screen = Screen(self._status)
        self.answers = 0
        self.rate = self.waited = 0.0  # of the last answer: tokens/s, seconds to its first token

    @property
    def session(self) -> Session:
        return self.chat.session

    def note(self, text: str) -> None:
        if not self.quiet:
            note(text)

    def say(self, text: str) -> None:
        """Answers a message, and runs the tools that the answer calls. A message that cannot be
        answered is taken back."""
        from ..tokenizer import Message

        self.chat.add(Message("user", text))
        before = len(self.chat.turns)
        try:
            for _ in range(ROUNDS):
                if not self._answer() or not self._run_calls():
                    return
            self.note(f"(no more than {ROUNDS} rounds of calls follow one message)")
        finally:
            if len(self.chat.turns) == before and self.chat.turns[-1].made is None:
                self.chat.undo()

    def _answer(self) -> bool:
        """Writes an answer as it is made; whether it is whole."""
        dropped, started, count, first = self.chat.dropped, time.perf_counter(), 0, None
        try:
            for text in self.chat.answer(max_new_tokens=self.max_new_tokens, **self.sampling):
                first = first or time.perf_counter()
                count += 1
                self.screen.write(text)
            return True
        except KeyboardInterrupt:
            self.screen.write("\n")
            self.note("(stopped)" if count else "(stopped; your message was taken back)")
            return False
        except LogitsError:
            self.screen.write("\n")
            raise
        finally:
            if first is not None:
                self.answers += 1
                self.waited = first - started
                self.rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
            if self.chat.finish_reason is not None:
                self.screen.write("\n")
            if self.chat.finish_reason == "length":
                self.note("(cut off: --max-new-tokens or the context allows no more)")
            if gone := self.chat.dropped - dropped:
                self.note(
                    f"(the context of {self.session.max_seq_len} tokens is full: the oldest "
                    f"{gone} messages have left it)"
                )

    def _run_calls(self) -> bool:
        """Runs the calls of the last answer; whether there were any."""
        message = self.chat.turns[-1].message
        if message.fault:
            self.note(f"(no call was made: {message.fault})")
        if not message.tool_calls or not self.tools.functions:
            return False
        for call in message.tool_calls:
            result = self.tools.run(call, self._may_run)
            self.chat.add(result)
            self.note(f"{shown(call)} → {result.content}")
        return True

    def _may_run(self, call: str) -> bool:
        if self.yes:
            return True
        answer = self.screen.ask(f"Run {call}? [y]es, [a]lways, [N]o:")
        self.yes = self.yes or answer in ("a", "always")
        return answer in ("y", "yes", "a", "always")

    def _status(self) -> str:
        parts = [f"context {len(self.session.tokens):,} of {self.session.max_seq_len:,}"]
        if self.answers:
            parts.append(f"{self.rate:.1f} tokens/s")
        return " · ".join([*parts, "/help"])

    def stats(self) -> list[tuple[str, str]]:
        """Returns names and values of what the dialog took."""
        session, chat = self.session, self.chat
        cache = session.engine.cache
        return [
            ("messages", f"{len(chat.turns)}, and {chat.dropped} that have left the context"),
            ("context", f"{len(session.tokens):,} of {session.max_seq_len:,} tokens held"),
            ("read", f"{session.prefilled:,} tokens of messages"),
            (
                "last answer",
                f"first token after {self.waited:.2f} s, {self.rate:.1f} tokens/s"
                if self.answers
                else "none yet",
            ),
            ("cache", f"{size(cache.nbytes)} in {str(cache.dtype).removeprefix('torch.')}"),
            ("format", chat.format.describe()),
        ]
