"""A dialog by the chat template of a model's own folder: a Jinja program that renders it as text.

The template runs as transformers runs it (the same sandbox, filters and settings), with these
differences:

- Control tokens come from the template alone. Where a content, an argument of a call or a tool's
  description spells one, each such name is hidden behind a private character while the template
  runs, and put back as ordinary text. A template that looks for such a name in a content (to split
  it, say) does not find it.
- "Today" is a fixed date, so that the ids of a dialog do not change from day to day.

Whose each token is follows from rendering the dialog message by message: an assistant's content is
what follows the text that asks for it, to the first token that ends a message.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PromptError, TokenizerError
from ..utils.files import given_path
from .chat_decode import decode_message
from .chat_encoded import Encoded, Owner
from .chat_messages import Message, as_messages
from .chat_owner import EndsAt, Span, owners, spans
from .chat_prompts import DATE
from .chat_tools import as_tools
from .files import json_beside
from .special_tokens import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from .tokenizer import Tokenizer, splitter

TEMPLATE_FILE = "chat_template.jinja"
_FIRST_PRIVATE = 0x100000  # Unicode's last private plane, which no text is expected to use


class TemplateFormat:
    """The format of a chat template over a tokenizer.

    template: Jinja source, or several by name: "tool_use" serves dialogs with tools, "default" the
    others. tokens: what the template calls bos_token, eos_token and so on. date: what it takes for
    today, as "26 Jul 2024". source: where the template is from, for `describe`.
    Raises PromptError for a template that is no Jinja, and for another date.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str],
        *,
        tokens: Mapping[str, str] | None = None,
        date: str = DATE,
        source: str = "a template",
    ):
        self.tokenizer, self.date, self.source = tokenizer, date, source
        self.templates = {"default": template} if isinstance(template, str) else dict(template)
        self.tokens = dict(tokens or {})
        if not self.templates:
            raise PromptError("no chat template is given; give its Jinja source")
        try:
            self._today = datetime.datetime.strptime(date, "%d %b %Y")
        except (ValueError, TypeError):
            raise PromptError(f"date is {date!r}; give a day as {DATE!r}") from None
        self._compiled = {
            name: _environment(self._today).compiled(source, name)
            for name, source in self.templates.items()
        }
        # An added word controls where it ends a text or the template writes it.
        self._words = dict(tokenizer.added)
        self._controls = dict(tokenizer.specials)
        written = "".join(self.templates.values()) + "".join(self.tokens.values())
        for word, id_ in tokenizer.added.items():
            if id_ in tokenizer.stop_ids or word in written:
                self._controls[word] = self._words.pop(word)
        self._split = splitter(frozenset(self._controls)) if self._controls else None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, tokenizer: Tokenizer | None = None, *, date: str = DATE
    ) -> TemplateFormat:
        """Returns the format of a folder's chat_template.jinja, or else of "chat_template" in its
        tokenizer_config.json. Raises PromptError for a folder without, TokenizerError for damaged
        files."""
        folder = given_path(folder, "the folder of a model", TokenizerError)
        found = folder_templates(folder)
        if not found:
            raise PromptError(
                f"{folder} has no chat template (neither {TEMPLATE_FILE} nor chat_template in "
                f"{TOKENIZER_CONFIG}); use ChatFormat"
            )
        settings = json_beside(folder / SPECIAL_TOKENS_MAP)
        settings |= json_beside(folder / TOKENIZER_CONFIG)
        tokens = {}
        for key, value in settings.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
        tokenizer = tokenizer or Tokenizer.from_pretrained(folder)
        return cls(tokenizer, found, tokens=tokens, date=date, source=f"{folder}")

    def describe(self) -> str:
        """Returns which format this is, in one line."""
        return f"the chat template of {self.source} ({self.fingerprint()[:8]}), dated {self.date}"

    def fingerprint(self) -> str:
        """Returns a text that differs where the ids of any dialog could."""
        settings = ["template-1", sorted(self.templates.items()), sorted(self.tokens.items())]
        return hashlib.sha256(repr([*settings, self.date]).encode()).hexdigest()

    def encode(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        tools: Iterable[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """Returns the ids of a dialog and whose each is; arguments as `ChatFormat.encode`.

        Built-in tools are given to the template as `builtin_tools`. Raises PromptError where the
        template refuses the dialog, with its reason.
        """
        dialog = as_messages(messages)
        builtin, custom = as_tools(tools)
        given = {
            "messages": [message.as_dict() for message in dialog],
            "tools": [tool.as_dict() for tool in custom] or None,
        }
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise PromptError(
                f"the chat templates are {', '.join(self.templates)}; none is for a dialog "
                f"{'with' if tools else 'without'} tools"
            )
        hidden = self._hide(given)
        given = _replaced(given, hidden)

        def render(first: int, asks: bool) -> str:
            """The dialog's first messages as text, with or without the header of an answer."""
            return self._render(name, given, builtin, first, asks)

        whole = render(len(dialog), add_generation_prompt)
        ends = {word for word, id_ in self._controls.items() if id_ in self.tokenizer.stop_ids}
        found, unmarked = spans(whole, given["messages"], render, self._ends_at(ends))
        shown = {private: control for control, private in hidden.items()}
        ids, owner = self._ids(whole, found, shown)
        if ids and ids[0] == self.tokenizer.bos_id:
            owner[0] = Owner(-1, False)
        return Encoded(ids, owner, tuple(unmarked))

    def decode_message(
        self, found: str | Sequence[int], *, tools: Iterable[Any] | None = None
    ) -> Message:
        """Returns the assistant's message of ids or text that a model made: `decode_message`."""
        return decode_message(found, self.tokenizer, tools=tools)

    def _render(
        self, name: str, given: Mapping[str, Any], builtin: list[str], first: int, asks: bool
    ) -> str:
        names = {"builtin_tools": builtin} if builtin else {}
        try:
            return self._compiled[name].render(
                **self.tokens,
                **names,
                date_string=self.date,
                messages=given["messages"][:first],
                tools=given["tools"],
                documents=None,
                add_generation_prompt=asks,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise PromptError(f"the chat template refuses the dialog: {error}") from None

    def _hide(self, given: Any) -> dict[str, str]:
        """Names of control tokens that the dialog spells, each with a character that it has not."""
        if self._split is None:
            return {}
        texts = list(_texts(given))
        names = sorted({name for text in texts for name in self._split.findall(text)})
        used = set().union(*texts) if names else set()
        free = (c for c in map(chr, range(_FIRST_PRIVATE, 0x10FFFE)) if c not in used)
        return dict(zip(names, free, strict=False))

    def _ends_at(self, ends: set[str]) -> EndsAt:
        """Returns a function of a text and a place: where the first token that ends a message ends
        from there on, None where there is none."""
        pattern = splitter(frozenset(ends)) if ends else None

        def ends_at(text: str, start: int, stop: int) -> int | None:
            found = pattern.search(text, start, stop) if pattern else None
            return found.end() if found else None

        return ends_at

    def _ids(
        self, whole: str, found: Sequence[Span], shown: Mapping[str, str]
    ) -> tuple[list[int], list[Owner]]:
        """The ids of a rendered dialog, and their owners by those of its characters."""
        ids: list[int] = []
        owner: list[Owner] = []
        at = 0
        lengths = self.tokenizer.id_to_bytes
        for n, part in enumerate(self._split.split(whole) if self._split else (whole,)):
            inside = [
                (_shown(whole[max(a, at) : min(b, at + len(part))], shown), whose)
                for a, b, whose in found
                if a < at + len(part) and b > at
            ]
            if n % 2:
                ids.append(self._controls[part])
                owner.append(inside[0][1])
            elif part:
                new = self.tokenizer.encode_words(_shown(part, shown), self._words)
                ids += new
                sizes = [(len(text.encode()), whose) for text, whose in inside]
                owner += owners([len(lengths[id_]) for id_ in new], sizes)
            at += len(part)
        return ids, owner


def folder_templates(folder: Path) -> dict[str, str]:
    """Returns the chat templates of a folder by name, none where it has none. Raises TokenizerError
    for damaged files."""
    path = folder / TEMPLATE_FILE
    try:
        if path.exists():
            return {"default": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read ({error})") from error
    listed = json_beside(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(listed, str):
        return {"default": listed}
    try:
        found = {entry["name"]: entry["template"] for entry in listed or ()}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is neither a text nor a list of named ones"
        )
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, words: Mapping[str, str]) -> Any:
    """A copy of a JSON value with these words replaced in its texts, the longest first."""
    if isinstance(value, str):
        return splitter(frozenset(words)).sub(lambda m: words[m[1]], value) if words else value
    if isinstance(value, Mapping):
        return {_replaced(key, words): _replaced(item, words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, words) for item in value]
    return value


def _shown(text: str, shown: Mapping[str, str]) -> str:
    for private, control in shown.items():
        text = text.replace(private, control)
    return text


@functools.lru_cache(maxsize=8)
def _environment(today: datetime.datetime) -> Any:
    """Jinja's sandbox as transformers sets it up, imported at the first use."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which marks answers for others: its body."""

        tags = frozenset(["generation"])

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        def compiled(self, source: object, name: str) -> Any:
            if not isinstance(source, str):
                raise PromptError(f"chat template {name!r} is {type(source).__name__}, no text")
            try:
                return self.from_string(source)
            except jinja2.TemplateError as error:
                raise PromptError(f"chat template {name!r} is no Jinja template: {error}") from None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    found = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = today.strftime
    return found
