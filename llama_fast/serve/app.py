"""The routes: a request's body is read and checked, its jobs go into the batch, and their pieces
come back as one object or as server-sent events."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import LlamaFastError, RequestError
from .answers import Answer
from .batch import Batch
from .bodies import read_json
from .job import Job, Piece
from .requests import Asked, Served, chat_request, text_request
from .responses import EventStream, Gone, answer_json, failure

LOCAL = ("localhost", "127.0.0.1", "::1")


class Server:
    """The application over a batch, and what hands the batch's pieces to the requests.

    key: what requests must bring as a bearer token; None: nothing. local: without a key, take
    requests only that name this machine as their host. Made before the batch, whose `publish` it
    is; `batch` and `loop` are set before the first request.
    """

    def __init__(self, served: Served, key: str | None = None, *, local: bool = False) -> None:
        self.served = served
        self.batch: Batch
        self.loop: asyncio.AbstractEventLoop | None = None
        self._key = None if key is None else key.encode()
        self._local = local
        self._created = int(time.time())
        # Which queue each job's pieces go into. Touched in the event loop alone.
        self._boxes: dict[Job, asyncio.Queue[tuple[Job, Piece] | None]] = {}
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.text, methods=["POST"]),
        ]
        failures: dict[Any, Callable] = {
            LlamaFastError: failure,
            HTTPException: failure,
            Exception: failure,
            Gone: lambda *_: Response(status_code=499),
            ClientDisconnect: lambda *_: Response(status_code=499),
        }
        inner = Starlette(routes=routes, exception_handlers=failures)
        self.app: ASGIApp = self._measured(inner)

    def publish(self, pieces: list[tuple[Job, Piece]]) -> None:
        """Hands the pieces to the requests that wait for them; called in the batch's thread."""
        try:
            self.loop.call_soon_threadsafe(self._deliver, pieces)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    def _deliver(self, pieces: list[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            if (box := self._boxes.get(job)) is not None:
                box.put_nowait((job, piece))

    # Routes --------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Whether new requests are taken."""
        ok = not self.batch.draining and self.batch.failed is None
        return answer_json({"status": "ok" if ok else "stopping"}, 200 if ok else 503)

    async def metrics(self, request: Request) -> Response:
        self._check_key(request)
        batch = self.batch
        gauges = {
            "queue_length": ("Answers that wait for a row.", lambda: batch.waiting),
            "rows_in_use": ("Rows that hold an answer.", lambda: batch.rows_in_use),
            "rows": ("Rows of the batch.", lambda: batch.rows),
        }
        kind = "text/plain; version=0.0.4"
        return PlainTextResponse(batch.metrics.text(gauges), media_type=kind)

    def _model(self) -> dict[str, Any]:
        name, length = self.served.name, self.served.max_seq_len
        made = {"id": name, "object": "model", "created": self._created, "owned_by": "llama_fast"}
        return {**made, "max_model_len": length}

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return answer_json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        if request.path_params["name"] != self.served.name:
            raise RequestError(
                f"no such model is served here; there is {self.served.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return answer_json(self._model())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat_request)

    async def text(self, request: Request) -> Response:
        return await self._answer(request, text_request)

    async def _answer(self, request: Request, read: Callable[[Served, Any], Asked]) -> Response:
        self._check_key(request)
        body = await read_json(request)
        # In another thread: templates, the tokenizer and grammars take their time.
        asked = await asyncio.to_thread(read, self.served, body)
        answer = Answer(asked, self.served.name, self.served.tokenizer)
        pieces = self._pieces(request, asked.jobs)
        try:
            if not asked.stream:
                async for several in pieces:
                    for job, piece in several:
                        answer.choices[job.address].take(piece)
                return answer_json(answer.whole())
            # What cannot be answered has its status; so the stream begins with the first token.
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return EventStream(answer, first, pieces)

    async def _pieces(
        self, request: Request, jobs: list[Job]
    ) -> AsyncIterator[list[tuple[Job, Piece]]]:
        """Makes the jobs' answers; yields what has come in. Raises the error of the first that
        fails, and Gone when the client leaves. However it ends, no job is left in the batch."""
        box: asyncio.Queue[tuple[Job, Piece] | None] = asyncio.Queue()

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            box.put_nowait(None)

        self._boxes |= dict.fromkeys(jobs, box)
        watching = asyncio.create_task(watch())
        left = len(jobs)
        try:
            self.batch.submit(jobs)
            while left:
                several = [await box.get()]
                while not box.empty():
                    several.append(box.get_nowait())
                if None in several:
                    raise Gone
                for _, piece in several:
                    if piece.error is not None:
                        raise piece.error
                    left -= piece.finish_reason is not None
                yield several
        finally:
            watching.cancel()
            for job in jobs:
                self._boxes.pop(job, None)
            if left:
                self.batch.cancel(jobs)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            # A page of another site can give its own name this machine's address, and then passes
            # for one of ours; but its requests name its own host.
            if self._local and request.url.hostname not in LOCAL:
                raise RequestError(
                    f"the host {request.url.hostname!r} is not served; ask for localhost, or start "
                    "the server with --api-key",
                    status=403,
                )
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in full, so that the time tells nothing about the key.
        same = hmac.compare_digest(given.strip().encode(), self._key)
        if not same or scheme.lower() != "bearer":
            raise RequestError(
                "the key is missing or wrong; give Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )

    def _measured(self, app: ASGIApp) -> ASGIApp:
        """Counts requests by path and status, and their seconds."""

        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            status, begin = 499, time.perf_counter()

            async def watched(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                # Paths that nobody serves are one, whatever clients invent.
                route = scope.get("route")
                path = getattr(route, "path", None) or "other"
                self.batch.metrics.request(path, status)
                self.batch.metrics.observe("request", time.perf_counter() - begin)

        return measured
