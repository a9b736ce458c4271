"""Answers as OpenAI's objects: whole ones, and chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from ..errors import JSON_ERRORS
from ..tokenizer import Tokenizer
from ..tokenizer.chat_parse import CALLS_JSON
from .call_reader import CallPiece
from .job import Job, Piece
from .requests import Asked

REASONS = {"stop": "stop", "stop_string": "stop", "length": "length"}


def to_json(value: Any) -> bytes:
    """Returns JSON in UTF-8. What a model wrote as an escape may be no character, and becomes ?."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="replace")


class Choice:
    """One answer as it comes in."""

    def __init__(self, index: int, asked: Asked, tokenizer: Tokenizer) -> None:
        self.index, self._asked, self._tokenizer = index, asked, tokenizer
        self._reader = asked.call_reader(tokenizer) if asked.tools else None
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[dict[str, Any]] = []  # with their logprobs
        self.finish_reason: str | None = None

    def take(self, piece: Piece) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
        """Takes the next piece; returns what it adds to the text, to the calls and to the tokens.
        Each call comes with its name first, then with more and more of its arguments."""
        text, calls, tokens = piece.text, [], []
        if self._reader is not None:
            text, parts = self._reader.push(piece.token, piece.text)
            calls = [self._call_delta(part) for part in parts]
        # A token that ends an answer is no part of it.
        ends = piece.token in self._tokenizer.stop_ids and piece.finish_reason == "stop"
        if self._asked.top is not None and not ends:
            tokens = [self._scored(piece)]
        if piece.finish_reason:
            self.finish_reason = REASONS[piece.finish_reason]
            if self._reader is not None:
                text += self._reader.end()
                if self.calls and not self._reader.open:
                    self.finish_reason = "tool_calls"
        self.text += text
        self.tokens += tokens
        return text, calls, tokens

    def _call_delta(self, part: CallPiece) -> dict[str, Any]:
        """Adds to the calls; returns what is new, as a stream tells it."""
        function = {"arguments": part.arguments}
        if part.name is None:
            self.calls[-1]["function"]["arguments"] += part.arguments
            return {"index": len(self.calls) - 1, "function": function}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        function = {"name": part.name, **function}
        self.calls.append({**call, "function": {**function}})
        return {"index": len(self.calls) - 1, **call, "function": function}

    def message(self) -> dict[str, Any]:
        """Returns the whole answer. One with a call that is cut off, or whose arguments are no
        JSON, is text."""
        if self.calls and not all(map(_is_call, self.calls)):
            self.text, self.calls = self._reader.text, []
            if self.finish_reason == "tool_calls":
                self.finish_reason = "stop"
        made = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            made |= {"tool_calls": self.calls, "content": self.text or None}
        return made

    def _scored(self, piece: Piece) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            word = self._tokenizer.id_to_bytes[token]
            text = word.decode("utf-8", errors="replace")
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(word)}

        known = [(id_, score) for id_, score in piece.top if id_ < len(self._tokenizer.id_to_bytes)]
        top = [one(*entry) for entry in known]
        return {**one(piece.token, piece.logprob), "top_logprobs": top}


def _is_call(call: dict[str, Any]) -> bool:
    try:
        CALLS_JSON.decode(call["function"]["arguments"])
    except JSON_ERRORS:
        return False
    return True


class Answer:
    """All answers to one request."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self.asked = asked
        self.choices = [Choice(n, asked, tokenizer) for n in range(len(asked.jobs))]
        self._begun: set[int] = set()  # streams that have told their role
        kind = "chat.completion" if asked.chat else "text_completion"
        whole = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        streamed = asked.stream and asked.chat
        self._head = {
            "id": whole,
            "object": f"{kind}.chunk" if streamed else kind,
            "created": int(time.time()),
            "model": model,
        }

    def chunks(self, job: Job, piece: Piece) -> Iterable[dict[str, Any]]:
        """Yields what a piece adds to the stream."""
        choice = self.choices[job.address]
        text, calls, tokens = choice.take(piece)
        if not self.asked.chat:
            if text or tokens or choice.finish_reason:
                body = {"text": text, "logprobs": self._text_logprobs(choice, tokens)}
                yield self._chunk(choice, body, choice.finish_reason)
            return
        if job.address not in self._begun:
            self._begun.add(job.address)
            yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None)
        logprobs = {"content": tokens, "refusal": None} if tokens else None
        if text or tokens:
            yield self._chunk(choice, {"delta": {"content": text}, "logprobs": logprobs}, None)
        for call in calls:
            yield self._chunk(choice, {"delta": {"tool_calls": [call]}}, None)
        if choice.finish_reason:
            yield self._chunk(choice, {"delta": {}}, choice.finish_reason)

    def _chunk(self, choice: Choice, body: dict[str, Any], reason: str | None) -> dict[str, Any]:
        made = {"index": choice.index, **body, "finish_reason": reason}
        made.setdefault("logprobs", None)
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head, "choices": [made], **usage}

    def last_chunk(self) -> dict[str, Any]:
        """Returns the chunk of stream_options.include_usage."""
        return {**self._head, "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """Returns the object of an answer that is not streamed."""
        choices = []
        for choice in self.choices:
            if self.asked.chat:
                body = {"message": choice.message(), "logprobs": None}
                if self.asked.top is not None:
                    body["logprobs"] = {"content": choice.tokens, "refusal": None}
            else:
                logprobs = self._text_logprobs(choice, choice.tokens)
                body = {"text": choice.text, "logprobs": logprobs}
            made = {"index": choice.index, **body, "finish_reason": choice.finish_reason}
            choices.append(made)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        prompt = self.asked.prompt_tokens
        made = sum(job.made for job in self.asked.jobs)
        # Every answer to a prompt has a job of its own, and the prompt counts once.
        reused = min(sum(job.reused for job in self.asked.jobs), prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _text_logprobs(self, choice: Choice, tokens: list[dict[str, Any]]) -> dict | None:
        """The older form of logprobs. Offsets are into the text of the tokens."""
        if self.asked.top is None:
            return None
        before = choice.tokens[: len(choice.tokens) - len(tokens)]
        offset, offsets = sum(len(token["token"]) for token in before), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token["token"])
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens
            ],
            "text_offset": offsets,
        }
