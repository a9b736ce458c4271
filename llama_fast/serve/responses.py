"""What goes back to a client: an object, a stream of events, or an error as OpenAI describes it."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import BusyError, LlamaFastError, LogitsError, RequestError
from .answers import Answer, to_json
from .job import Job, Piece

RETRY_SECONDS = 1
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "overloaded_error",
}


class Gone(Exception):
    """The client has left."""


class EventStream(Response):
    """An answer as server-sent events. What fails on the way is an event too, the last one."""

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Answer,
        first: list[tuple[Job, Piece]],
        pieces: AsyncIterator[list[tuple[Job, Piece]]],
    ) -> None:
        self.status_code, self.background = 200, None
        self._answer, self._first, self._pieces = answer, first, pieces
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send(start)
            await body(self._events(self._first))
            async for several in self._pieces:
                await body(self._events(several))
            last = [self._answer.last_chunk()] if self._answer.asked.include_usage else []
            await body(b"".join(map(event, last)) + b"data: [DONE]\n\n", more=False)
        except (Gone, OSError):  # nobody reads
            pass
        except Exception as error:
            _, shown = described(error)
            await body(event(shown), more=False)
        finally:
            await self._pieces.aclose()

    def _events(self, several: list[tuple[Job, Piece]]) -> bytes:
        chunks = (chunk for job, piece in several for chunk in self._answer.chunks(job, piece))
        return b"".join(map(event, chunks))


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Returns the HTTP status of an error, and OpenAI's object of it."""
    param = code = None
    text = str(error)
    if isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, BusyError):
        status, code = 503, "server_busy"
    elif isinstance(error, LogitsError):
        status = 500
    elif isinstance(error, LlamaFastError):
        status, code = 400, "invalid_request"
    elif isinstance(error, HTTPException):
        status, text = error.status_code, f"{error.detail}: see docs/serve.md for what is served"
    else:
        traceback.print_exception(error)
        status, text = 500, f"the server failed ({type(error).__name__}); its log says more"
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": text, "type": kind, "param": param, "code": code}}


async def failure(request: Request, error: Exception) -> Response:
    """Returns the response of an error."""
    status, shown = described(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:
        headers["retry-after"] = str(RETRY_SECONDS)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return answer_json(shown, status, headers)


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
