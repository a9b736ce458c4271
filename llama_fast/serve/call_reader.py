"""Calls of tools, told from text while an answer is made.

What may be a call waits: a JSON object or a list that begins a line, <function=NAME>, and what
follows <|python_tag|>. As soon as it is sure which tool is called, the call has begun: its name is
told, and its arguments are handed on as they come. A form whose name comes late, such as a list in
Python's syntax, is told when its last bracket is there; and what is no call after all is text.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from ..errors import PromptError
from ..tokenizer import ToolCall
from ..tokenizer.chat_parse import read_calls

_OPEN, _CLOSE = "<function=", "</function>"
_BEGINS = re.compile(rf"[\[{{]|{_OPEN}")
# Up to the arguments of a call that names its tool first.
_JSON_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([\w.-]+)"\s*,\s*'
    r'"(?:parameters|arguments)"\s*:\s*(?=\{)'
)
_TAG_HEAD = re.compile(rf"{_OPEN}([\w.-]+)>\s*(?=\{{)")
_TAG_PART = re.compile(rf"{_OPEN}[\w.-]*(?:>\s*)?\Z")
_LONGEST_HEAD = 400  # characters: a name has 64 at most
_BETWEEN = re.compile(rf"(?:[\s;,]|{_CLOSE})*")  # calls, or behind the last one


class CallPiece(NamedTuple):
    """A part of a call: the name of one that begins, or more of the JSON of its arguments."""

    name: str | None
    arguments: str = ""


class CallReader:
    """names: the tools that may be called; anything else that looks like a call is text.
    python_tag: the id of <|python_tag|>. single: nothing follows the first call.

    text: all that was pushed. open: whether the arguments of a call have begun and not ended.
    done: whether a single call is whole.
    """

    def __init__(self, names: frozenset[str], python_tag: int | None, single: bool = False) -> None:
        self.text, self.open, self.done = "", False, False
        self._names, self._tag, self._single = names, python_tag, single
        self._held = ""  # what may be a call, or the begin of one
        self._blanks = ""  # before it
        self._may_begin = True  # a call, behind the blanks that are held
        self._behind_call = False
        # The bracket that the held text begins with, and that of the arguments; how far both are
        # looked through.
        self._unit: _Bracket | None = None
        self._arguments: _Bracket | None = None
        self._at = 0

    def push(self, token: int, text: str) -> tuple[str, list[CallPiece]]:
        """Takes a token and its text; returns what can be shown, and parts of calls."""
        self.text += text
        if self.done:
            return "", []
        if token == self._tag:
            self._may_begin = True
        self._held += text
        shown, pieces, moved = "", [], True
        while moved and not self.done:
            if self._arguments is not None:
                read = self._read_arguments
            else:
                read = self._read_text if self._unit is None else self._read_unit
            moved, more = read(pieces)
            shown += more
        return shown, pieces

    def ends(self, token: int, text: str) -> bool:
        """Takes a token and its text; whether a single call is whole with it."""
        self.push(token, text)
        return self.done

    def end(self) -> str:
        """Returns the rest of the text, when the answer is whole."""
        rest = self._blanks + self._held
        if self.open or self.done or (self._behind_call and _BETWEEN.fullmatch(rest)):
            return ""
        return rest

    def _read_text(self, pieces: list[CallPiece]) -> tuple[bool, str]:
        """Looks for the begin of a call. As all three that read: whether there is more to read
        now, and what can be shown."""
        held, behind = self._held, -1
        if not held or held.isspace():
            return False, ""
        if self._behind_call:
            behind = _BETWEEN.match(held).end()
            rest = held[behind:]
            if not rest or _CLOSE.startswith(rest) or _OPEN.startswith(rest):
                return False, ""
            if not _BEGINS.match(rest):  # text follows
                self._behind_call, self._held = False, rest
                return True, ""
        for found in _BEGINS.finditer(held):
            at = found.start()
            line = held.rfind("\n", 0, at) + 1
            begins_line = (line > 0 or self._may_begin) and not held[line:at].strip()
            if found.group() == _OPEN:
                return self._begin_tag(at, pieces)
            if begins_line or at == behind:
                self._unit, self._at = _Bracket('"' if held[at] == "{" else "\"'"), 0
                return True, self._hold(at)
        partial = next((n for n in range(len(_OPEN) - 1, 0, -1) if held.endswith(_OPEN[:n])), 0)
        return False, self._show(len(held[: len(held) - partial].rstrip()))

    def _begin_tag(self, at: int, pieces: list[CallPiece]) -> tuple[bool, str]:
        """<function= stands at this place of the held text."""
        head = _TAG_HEAD.match(self._held, at)
        if head and head[1] in self._names:
            shown = self._hold(at)
            self._begin_arguments(head[1], head.end() - at, pieces)
            return True, shown
        partly = len(self._held) - at < _LONGEST_HEAD and _TAG_PART.match(self._held, at)
        if not head and partly:
            return False, self._show(self._before(at))
        return True, self._show(at + len(_OPEN))

    def _hold(self, at: int) -> str:
        """Returns the text before a place where a call may begin. Blanks there belong to the call,
        if it is one, and so does what stands between two."""
        before = self._before(at)
        self._blanks = self._held[before:at]
        shown = self._show(before)
        self._held = self._held[at - before :]
        return shown

    def _before(self, at: int) -> int:
        return 0 if self._behind_call else len(self._held[:at].rstrip())

    def _read_unit(self, pieces: list[CallPiece]) -> tuple[bool, str]:
        """Looks for the end of a bracket that begins the held text; or for the arguments in it."""
        head = None if self.open else _JSON_HEAD.match(self._held, 0, _LONGEST_HEAD)
        if head and head[1] in self._names:
            self._unit = _Bracket('"', depth=1)
            self._begin_arguments(head[1], head.end(), pieces)
            return True, ""
        end = self._unit.end_in(self._held, self._at)
        if end < 0:
            self._at = len(self._held)
            return False, ""
        self._unit = None
        if not self.open:
            _, calls, _ = read_calls(self._held[:end], None, self._names)
            if not calls or not all(call.name in self._names for call in calls):
                blanks, self._blanks, self._behind_call = self._blanks, "", False
                return True, blanks + self._show(end)
            for call in calls[:1] if self._single else calls:
                pieces += CallPiece(call.name), CallPiece(None, arguments_json(call))
        self._held = self._held[end:]
        self._call_ended()
        return True, ""

    def _begin_arguments(self, name: str, at: int, pieces: list[CallPiece]) -> None:
        pieces.append(CallPiece(name))
        self._held, self.open, self._arguments = self._held[at:], True, _Bracket('"')

    def _read_arguments(self, pieces: list[CallPiece]) -> tuple[bool, str]:
        """Hands on the arguments, up to their last bracket."""
        end = self._arguments.end_in(self._held, 0)
        part = self._held if end < 0 else self._held[:end]
        self._held = self._held[len(part) :]
        if part:
            pieces.append(CallPiece(None, part))
        if end < 0:
            return False, ""
        self._arguments, self._at = None, 0
        if self._unit is None:
            self._call_ended()
        return True, ""

    def _call_ended(self) -> None:
        self.open, self._behind_call, self.done = False, True, self._single
        self._blanks = ""

    def _show(self, end: int) -> str:
        shown, self._held = self._held[:end], self._held[end:]
        if shown.strip():
            self._may_begin = False
        return shown


class _Bracket:
    """Finds the end of a bracketed text that comes in parts. quotes: what begins its strings."""

    def __init__(self, quotes: str, depth: int = 0) -> None:
        self.depth = depth
        self._quotes, self._quote, self._escaped = quotes, "", False

    def end_in(self, text: str, start: int) -> int:
        """Goes on from `start`; returns the place behind the last bracket, or -1."""
        for at in range(start, len(text)):
            sign = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = sign == "\\"
                self._quote = "" if sign == self._quote else self._quote
            elif sign in self._quotes:
                self._quote = sign
            elif sign in "[({":
                self.depth += 1
            elif sign in "])}":
                self.depth -= 1
                if self.depth <= 0:
                    return at + 1
        return -1


def arguments_json(call: ToolCall) -> str:
    """Returns the arguments of a call as JSON text."""
    try:
        return json.dumps(dict(call.arguments), ensure_ascii=False)
    except RecursionError:
        raise PromptError("the arguments of a call are nested too deeply") from None
