"""Llama 3's chat formats: a dialog becomes token ids, each of which knows its message.

    <|begin_of_text|> { <|start_header_id|>ROLE<|end_header_id|>\\n\\n CONTENT <|eot_id|> } …

An assistant's message that calls a tool and waits for its result ends with <|eom_id|> in Meta's
form. Two forms of each release ("3.0", "3.1", "3.2", "3.3"):

- "meta": a message's content as it is, no system message unless one is given or tools are.
- "hf": what the chat template of the release on Hugging Face renders: contents trimmed, a dated
  system block since 3.1, one call a turn as JSON, which ends with <|eot_id|>.

The control tokens come from the format alone: each content is encoded by itself, as ordinary text,
so what looks like a control token in it stays text. Facts of the format: docs/chat.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .chat_calls import AFTER_PYTHON_TAG, json_text, write_calls
from .chat_decode import decode_message
from .chat_encoded import Encoded, Owner
from .chat_messages import BUILTIN_TOOLS, CODE, Message, ToolCall, as_messages
from .chat_prompts import DATE, custom_tools_text, hf_tools_text
from .chat_tools import ToolDefinition, as_tools
from .special_tokens import BOS, END_HEADER, EOM, EOT, PYTHON_TAG, START_HEADER
from .tokenizer import Tokenizer

RELEASES = ("3.0", "3.1", "3.2", "3.3")
FORMS = ("meta", "hf")
# How a release is told to write calls of custom tools in Meta's form.
STYLES = {"3.0": "json", "3.1": "json", "3.2": "python_list", "3.3": "python_list"}


class ChatFormat:
    """A release's format over a tokenizer.

    release: "3.0", "3.1", "3.2" or "3.3". form: "meta" or "hf". date: today's date in the system
    block; fixed, so that the ids of a dialog do not change from day to day. tool_style: how the
    model is told to call custom tools in Meta's form: "json", "tag" or "python_list"; None is the
    release's. The vocabulary may lack <|eom_id|> and <|python_tag|>, as 3.0's does: calls of custom
    tools then end with <|eot_id|>, and built-in tools are refused. Raises PromptError for other
    settings and for a vocabulary without the tokens of a header.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        release: str = "3.1",
        *,
        form: str = "meta",
        date: str = DATE,
        tool_style: str | None = None,
    ):
        for name, value, allowed in (
            ("release", release, RELEASES),
            ("form", form, FORMS),
            ("tool_style", tool_style, (None, "json", "tag", "python_list")),
        ):
            if value not in allowed:
                raise PromptError(
                    f"{name}={value!r} is unknown; give one of "
                    + ", ".join(str(choice) for choice in allowed)
                )
        if form == "hf" and tool_style not in (None, "json"):
            raise PromptError(
                f'form="hf" writes calls as JSON, not as tool_style={tool_style!r}; use form="meta"'
            )
        if not isinstance(date, str) or not date.strip():
            raise PromptError(f"date is {date!r}; give a text, such as {DATE!r}")
        missing = [n for n in (BOS, START_HEADER, END_HEADER, EOT) if n not in tokenizer.specials]
        if missing:
            raise PromptError(
                f"this vocabulary has no {', '.join(missing)}, which Llama 3's chat format needs; "
                "a fine-tune with tokens of its own has a chat template: use TemplateFormat"
            )
        self.tokenizer, self.release, self.form, self.date = tokenizer, release, form, date
        self.tool_style = tool_style or ("json" if form == "hf" else STYLES[release])
        self._id = tokenizer.specials
        self._headers: dict[str, list[int]] = {}
        # An added word that ends a text is a control token too.
        stops = tokenizer.stop_ids
        self._words = {word: id_ for word, id_ in tokenizer.added.items() if id_ not in stops}

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, *, date: str = DATE) -> ChatFormat:
        """Returns the format that the special tokens of a vocabulary tell of: 3.0 without
        <|eom_id|>, Hugging Face's form of 3.1 where its table of specials is theirs, else Meta's
        form of 3.1. Folders tell more: `chat_format`."""
        if EOM not in tokenizer.specials:
            return cls(tokenizer, "3.0", date=date)
        meta = "<|step_id|>" in tokenizer.specials
        return cls(tokenizer, "3.1", form="meta" if meta else "hf", date=date)

    def describe(self) -> str:
        """Returns which format this is, in one line."""
        form = "Meta's form" if self.form == "meta" else "Hugging Face's form"
        dated = "" if self.release == "3.0" else f", dated {self.date}"
        return f"Llama {self.release}, {form}, calls as {self.tool_style}{dated}"

    def fingerprint(self) -> str:
        """Returns a text that differs where the ids of any dialog could; the version of this
        package's formats is a part of it."""
        settings = ("chat-1", self.release, self.form, self.date, self.tool_style)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def encode(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        tools: Iterable[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """Returns the ids of a dialog and whose each is.

        messages: Message, or dicts as OpenAI and transformers write them. tools: functions,
        ToolDefinitions, dicts of JSON schema, and names of built-in tools. add_generation_prompt:
        end with the header of the assistant's answer.

        Raises PromptError for no messages, and for what the form cannot write.
        """
        dialog = as_messages(messages)
        builtin, custom = as_tools(tools)
        if builtin and not self._in_ipython():
            raise PromptError(
                f"the built-in tools {', '.join(builtin)} need {PYTHON_TAG} and {EOM}, which "
                f"{self.describe()} over this vocabulary has not; give other tools, or a "
                "vocabulary and a release of 3.1 or later"
            )
        ids, owner = [self._id[BOS]], [Owner(-1, False)]
        write = self._hf if self.form == "hf" else self._meta
        for n, role, content, end in write(dialog, builtin, custom):
            header, body = self.header(role), [*self._content(content), self._id[end]]
            ids += header + body
            owner += [Owner(n, False)] * len(header)
            owner += [Owner(n, n >= 0)] * len(body)
        if add_generation_prompt:
            header = self.header("assistant")
            ids += header
            owner += [Owner(-1, False)] * len(header)
        return Encoded(ids, owner)

    def header(self, role: str) -> list[int]:
        """Returns the ids before a message's content."""
        if role not in self._headers:
            text = self.tokenizer.encode
            header = [self._id[START_HEADER], *text(role), self._id[END_HEADER], *text("\n\n")]
            self._headers[role] = header
        return list(self._headers[role])

    def decode_message(
        self, found: str | Sequence[int], *, tools: Iterable[Any] | None = None
    ) -> Message:
        """Returns the assistant's message of ids or text that a model made: `decode_message`."""
        return decode_message(found, self.tokenizer, tools=tools)

    def _in_ipython(self) -> bool:
        """Whether calls may follow <|python_tag|> and end with <|eom_id|>."""
        return self.release != "3.0" and {PYTHON_TAG, EOM} <= self._id.keys()

    def _content(self, parts: Sequence[str]) -> list[int]:
        """Ids of content in which <|python_tag|> stands between its parts."""
        ids: list[int] = []
        for n, part in enumerate(parts):
            ids += [self._id[PYTHON_TAG]] if n else []
            ids += self.tokenizer.encode_words(part, self._words)
        return ids

    # Meta's form ---------------------------------------------------------------------------------

    def _meta(self, dialog: list[Message], builtin: list[str], custom: list[ToolDefinition]):
        """Yields (index, role, parts of the content, name of the end token) of each message."""
        before = self._meta_tools(builtin, custom)
        if before and dialog[0].role != "system":
            yield -1, "system", [before], EOT
        for n, message in enumerate(dialog):
            content = _text(message)
            if n == 0 and message.role == "system":
                content = "\n\n".join(filter(None, (before, content)))
            if not message.tool_calls:
                yield n, message.role, [content], EOT
                continue
            style, text = self._calls(message, self.tool_style, typed=True)
            waits = EOM if self._in_ipython() else EOT
            if style in AFTER_PYTHON_TAG or (content and self._in_ipython()):
                yield n, message.role, [content, text], waits
            else:
                # Without <|python_tag|> the calls stand on lines of their own, after the text.
                yield n, message.role, [f"{content}\n{text}" if content else text], waits

    def _meta_tools(self, builtin: list[str], custom: list[ToolDefinition]) -> str:
        """The text about tools, which stands before the system message's own."""
        if not builtin and not custom:
            return ""
        blocks = []
        if self._in_ipython():
            named = [name for name in builtin if name != CODE]
            tools = [f"Tools: {', '.join(named)}"] if named else []
            blocks.append("\n".join(["Environment: ipython", *tools, *self._dates()]))
        if custom:
            blocks.append(custom_tools_text(custom, self.tool_style))
        return "\n\n".join(blocks)

    def _dates(self) -> list[str]:
        return ["Cutting Knowledge Date: December 2023", f"Today Date: {self.date}"]

    def _calls(self, message: Message, style: str, typed: bool) -> tuple[str, str]:
        """The style of a message's calls, and their text."""
        kinds = {_kind(call) or style for call in message.tool_calls}
        if len(kinds) > 1:
            raise PromptError(
                f"a message has calls of the kinds {', '.join(sorted(kinds))}; give each kind its "
                "own message"
            )
        style = kinds.pop()
        if style in AFTER_PYTHON_TAG and not self._in_ipython():
            raise PromptError(
                f'a call of {message.tool_calls[0].name} of kind="{style}" needs {PYTHON_TAG}, '
                f'which {self.describe()} over this vocabulary has not; use kind="json"'
            )
        return style, write_calls(message.tool_calls, style, typed)

    # Hugging Face's form -------------------------------------------------------------------------

    def _hf(self, dialog: list[Message], builtin: list[str], custom: list[ToolDefinition]):
        """As `_meta`. 3.0's template knows no tools; 3.2's no built-in ones."""
        if self.release == "3.0":
            if custom or any(message.tool_calls for message in dialog):
                raise PromptError(
                    "the chat template of Llama 3.0 knows no tools and would leave them out; "
                    'use form="meta", or a later release'
                )
            yield from ((n, m.role, [_text(m).strip()], EOT) for n, m in enumerate(dialog))
            return
        if builtin and self.release == "3.2":
            raise PromptError(
                f"the chat template of Llama 3.2 knows no built-in tools ({', '.join(builtin)}); "
                'use form="meta", or give functions'
            )
        with_system = dialog[0].role == "system"
        system = dialog[0].content.strip() if with_system else ""
        block = self._hf_block(builtin, bool(custom)) + system
        yield (0 if with_system else -1), "system", [block], EOT
        first = int(with_system)
        for n, message in enumerate(dialog[first:], first):
            if n == first and custom:
                if message.role != "user":
                    raise PromptError(
                        "the chat template describes tools in the first user message, and the "
                        f"first one here is of role {message.role}; begin with a user message"
                    )
                yield n, "user", [hf_tools_text(custom) + message.content.strip()], EOT
            elif message.tool_calls:
                yield n, "assistant", *self._hf_call(message, builtin)
            elif message.role == "ipython":
                # The template writes any result as JSON, a text in quotes.
                yield n, "ipython", [json_text(message.content, "a tool's result")], EOT
            else:
                yield n, message.role, [message.content.strip()], EOT

    def _hf_block(self, builtin: list[str], custom: bool) -> str:
        block = "Environment: ipython\n" if builtin or custom else ""
        if builtin:
            block += f"Tools: {', '.join(name for name in builtin if name != CODE)}\n\n"
        return block + "".join(f"{line}\n" for line in self._dates()) + "\n"

    def _hf_call(self, message: Message, builtin: list[str]) -> tuple[list[str], str]:
        """Parts of the content, and the end token, of a message with a call."""
        if len(message.tool_calls) > 1:
            raise PromptError(
                f"{len(message.tool_calls)} calls in one message; Hugging Face's form of Llama "
                f'{self.release} has one: give each its own message, or use form="meta"'
            )
        if message.content.strip():
            raise PromptError(
                "a message has text beside its tool call, which Hugging Face's form of Llama "
                f'{self.release} would leave out; remove the text, or use form="meta"'
            )
        call = message.tool_calls[0]
        # Custom calls are JSON here, and so are those of built-in tools that were not offered.
        kind = _kind(call) if call.kind or call.name in builtin else None
        written = kind if kind in AFTER_PYTHON_TAG else "json"
        one = Message("assistant", "", (ToolCall(call.name, call.arguments, written),))
        style, text = self._calls(one, "json", typed=False)
        parts = ["", text] if style in AFTER_PYTHON_TAG else [text]
        return parts, EOM if builtin else EOT


def _kind(call: ToolCall) -> str | None:
    """How a call is written, where that does not follow from the format: built-in tools by name."""
    if call.kind is not None or call.name not in BUILTIN_TOOLS:
        return call.kind
    return "code" if call.name == CODE else "builtin"


def _text(message: Message) -> str:
    """A message's content as text; a tool's result may be an object."""
    if isinstance(message.content, str):
        return message.content
    return json_text(message.content, "a tool's result")
