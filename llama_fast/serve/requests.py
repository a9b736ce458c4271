"""What a request asks for: OpenAI's fields in one plain form, checked. What cannot be honoured is
refused by name, and not left out in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError, RequestError
from ..generation.arguments import encode_prompts
from ..generation.generate import Rows
from ..generation.grammar import Grammar
from ..generation.sampling import Sampling
from ..model import Llama
from ..tokenizer import ChatFormat, Message, TemplateFormat, Tokenizer
from ..tokenizer.special_tokens import PYTHON_TAG
from .call_reader import CallReader
from .fields import Fields, shown
from .job import Job
from .tools import called, choice_of_tools, tools_of

MOST_TOP = 20  # likeliest tokens that a request may ask for
MOST_STOPS = 16
# What changes nothing in an answer here, and clients send anyway.
IGNORED = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user", "verbosity",
)  # fmt: skip
NO_PENALTY = "rows are drawn without penalties; leave it out, or give 0"


@dataclass(frozen=True)
class Served:
    """A model, and what requests to it may ask for.

    name: what requests call it. max_seq_len: tokens of a prompt and its answer. most_choices:
    answers that one request may ask for. sampling: how tokens are drawn where a request does not
    say.
    """

    name: str
    model: Llama
    tokenizer: Tokenizer
    format: ChatFormat | TemplateFormat
    max_seq_len: int
    most_choices: int
    kv_cache: str | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Asked:
    """What a request asks for. jobs: an answer each, n for each prompt in turn. tools: the names
    that answers may call; single_call: at most once; top: how many of the likeliest tokens are
    told, None without logprobs."""

    jobs: list[Job]
    stream: bool
    include_usage: bool
    top: int | None
    chat: bool
    tools: frozenset[str] = field(default_factory=frozenset)
    single_call: bool = False
    prompt_tokens: int = 0

    def call_reader(self, tokenizer: Tokenizer) -> CallReader:
        """Returns what reads the calls of one answer."""
        tag = tokenizer.specials.get(PYTHON_TAG)
        return CallReader(self.tools, tag, self.single_call)


def chat_request(served: Served, body: Any) -> Asked:
    """Returns what the body of /v1/chat/completions asks for. Raises RequestError, PromptError."""
    fields = Fields(body)
    _check_model(served, fields)
    messages = _messages(fields)
    fields.ignore((*IGNORED, "reasoning_effort"))
    fields.only("logit_bias", ({},), "logits are not changed by hand; leave it out")
    fields.only("modalities", (["text"],), "answers are text")
    for name in ("functions", "function_call"):
        fields.only(name, (), "it is the older form of tools and tool_choice; give those")
    for name in ("audio", "prediction", "web_search_options"):
        fields.only(name, (), "answers are text that the model alone makes; leave it out")
    choice, offered = choice_of_tools(fields, tools_of(fields))
    single = not fields.flag("parallel_tool_calls", True)
    grammar = _grammar(fields)
    if grammar is not None and offered:
        fields.refuse(
            "response_format",
            'and tools exclude each other: a call has a form of its own; give tool_choice "none"',
            "unsupported_value",
        )
    if choice == "required":
        grammar = Grammar.json_schema(called(offered))
    top = fields.whole("top_logprobs", None, 0, MOST_TOP)
    with_logprobs = fields.flag("logprobs")
    if top is not None and not with_logprobs:
        fields.refuse("top_logprobs", "needs logprobs: true")
    limit = fields.whole("max_completion_tokens", None, 1)
    limit = fields.whole("max_tokens", None, 1) if limit is None else limit
    fields.ignore(("max_tokens",))
    ids = served.format.encode(messages, tools=offered).ids
    asked = Asked(
        [],
        *_streaming(fields),
        top=(top or 0) if with_logprobs else None,
        chat=True,
        tools=frozenset(tool.name for tool in offered),
        single_call=single,
    )
    n = fields.whole("n", 1, 1, served.most_choices)
    _add_jobs(served, fields, asked, [ids], n, limit, grammar)
    return asked


def text_request(served: Served, body: Any) -> Asked:
    """Returns what the body of /v1/completions asks for. Raises RequestError, PromptError."""
    fields = Fields(body)
    _check_model(served, fields)
    fields.ignore(IGNORED)
    fields.only("logit_bias", ({},), "logits are not changed by hand; leave it out")
    fields.only("echo", (False,), "the answer alone comes back")
    fields.only("suffix", ("",), "texts are continued at their end")
    prompts = encode_prompts(served.tokenizer, _prompt(fields))
    n = fields.whole("n", 1, 1, served.most_choices)
    fields.only("best_of", (n,), "every answer that is made is given back")
    limit = fields.whole("max_tokens", 16, 1)
    top = fields.whole("logprobs", None, 0, MOST_TOP)
    grammar = _grammar(fields)
    asked = Asked([], *_streaming(fields), top=top, chat=False)
    _add_jobs(served, fields, asked, prompts, n, limit, grammar)
    return asked


def _check_model(served: Served, fields: Fields) -> None:
    name = fields.text("model", served.name)
    if name != served.name:
        raise RequestError(
            f"the model {shown(name)} is not served here; give {served.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def _messages(fields: Fields) -> list[Message]:
    found = fields.list("messages")
    if not found:
        fields.refuse("messages", "is missing or empty; give a list with one message at least")
    messages = []
    for n, one in enumerate(found):
        where = f"messages[{n}]"
        given = Fields(one, where)
        role = given.text("role")
        calls = given.list("tool_calls")
        for call in calls or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                given.refuse("tool_calls", "holds something else than calls of functions")
        name, call_id = given.text("name"), given.text("tool_call_id")
        content = given.any("content")
        if not isinstance(content, str | list | None):
            given.refuse("content", "is no text; give a text, or a list of text parts")
        given.only("audio", (), "messages are text")
        given.only("function_call", (), "give tool_calls")
        given.ignore(("refusal", "annotations", "reasoning", "reasoning_content"))
        given.end()
        message = {
            "role": "system" if role == "developer" else role,
            "content": content,
            "tool_calls": calls,
            "name": name,
            "tool_call_id": call_id,
        }
        try:
            messages.append(Message.from_dict(message))
        except PromptError as error:
            raise RequestError(f"{where}: {error}", param=where) from None
    return messages


def _prompt(fields: Fields) -> str | list:
    """A text, the ids of one, or a list of either."""
    prompt = fields.any("prompt")

    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(type(id_) is int for id_ in value)

    if prompt in (None, "", []):
        fields.refuse("prompt", "is missing or empty; give some text to continue")
    if not isinstance(prompt, str) and not ids(prompt):
        if not isinstance(prompt, list) or not all(isinstance(x, str) or ids(x) for x in prompt):
            fields.refuse("prompt", "must be a text, a list of token ids, or a list of such")
    return prompt


def _grammar(fields: Fields) -> Grammar | None:
    """What response_format, regex or grammar asks for: one of them."""
    found = []
    if (form := fields.object("response_format")) is not None:
        kind = form.one_of("type", None, ("text", "json_object", "json_schema"))
        if kind is None:
            form.refuse("type", "is missing; give text, json_object or json_schema")
        if kind == "json_object":
            found.append(Grammar.json_object())
        if kind == "json_schema":
            inner = form.object("json_schema")
            if inner is None:
                form.refuse("json_schema", "is missing; give an object with name and schema")
            schema = inner.any("schema")
            if not isinstance(schema, dict):
                inner.refuse("schema", "is missing or no object; give a JSON schema")
            inner.ignore(("name", "description", "strict"))
            inner.end()
            found.append(Grammar.json_schema(schema))
        form.end()
    if (pattern := fields.text("regex")) is not None:
        found.append(Grammar.regex(pattern))
    if (source := fields.text("grammar")) is not None:
        found.append(Grammar.lark(source))
    if len(found) > 1:
        raise RequestError("response_format, regex and grammar were given together; give one")
    return found[0] if found else None


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    usage = False
    if options is not None:
        if not stream:
            fields.refuse("stream_options", "needs stream: true")
        usage = options.flag("include_usage")
        options.ignore(("include_obfuscation",))
        options.end()
    return stream, usage


def _stops(fields: Fields) -> list[str]:
    stop = fields.any("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MOST_STOPS
        or not all(isinstance(text, str) and text for text in stop)
    ):
        fields.refuse("stop", f"must be a text or up to {MOST_STOPS} of them, none of them empty")
    return stop


def _add_jobs(
    served: Served,
    fields: Fields,
    asked: Asked,
    prompts: Sequence[list[int]],
    n: int,
    limit: int | None,
    grammar: Grammar | None,
) -> None:
    """Adds the jobs of n answers to each prompt; takes the fields that say how tokens are drawn.
    Each of the n has a seed of its own, one more than the last."""
    if n * len(prompts) > served.most_choices:
        fields.refuse(
            "n", f"× prompts is {n * len(prompts)}; this server makes {served.most_choices} at once"
        )
    default = served.sampling
    sampling = Sampling(
        temperature=fields.number("temperature", default.temperature, 0, 100),
        top_p=fields.number("top_p", default.top_p, 0, 1),
        top_k=fields.whole("top_k", default.top_k, 0, 2**31),
    )
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    stop = _stops(fields)
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, (0,), NO_PENALTY)
    fields.end()
    asked.prompt_tokens = sum(map(len, prompts))
    for ids in prompts:
        room = served.max_seq_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context is {served.max_seq_len}, the "
                "answer included; shorten it",
                param="messages" if asked.chat else "prompt",
                code="context_length_exceeded",
            )
        for choice in range(n):
            own = None if seed is None else seed + choice
            rows = Rows(
                served.model,
                served.tokenizer,
                [ids],
                room if limit is None else min(limit, room),
                own,
                stop,
                None,
                served.kv_cache,
                grammar,
            )
            job = Job(rows, sampling, asked.top or 0, address=len(asked.jobs))
            if asked.tools and asked.single_call:
                job.ends = asked.call_reader(served.tokenizer).ends
            asked.jobs.append(job)
