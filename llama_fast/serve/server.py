"""Runs the application and its batch, from the first request to the last answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import uvicorn

from .app import Server
from .batch import Batch
from .requests import Served

# A thread that has the interpreter gives it up after so long: a step of the batch must not wait
# for the events of many clients to be written. Python's own value is 5 ms.
SWITCH_SECONDS = 0.0005
SPARE_CONNECTIONS = 256  # beyond those that the rows and the queue can serve


class HttpServer(uvicorn.Server):
    """Uvicorn's server, which on Ctrl-C or a termination first empties the batch's queue."""

    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[str], Any]) -> None:
        super().__init__(config)
        self._server, self._ready = server, ready

    async def startup(self, sockets: Any = None) -> None:
        self._server.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: Any = None) -> None:
        self._server.batch.drain()
        await super().shutdown(sockets)


def run(
    served: Served,
    *,
    rows: int,
    queue: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    backend: str | None = None,
    reuse: bool = True,
    started: Callable[[HttpServer], Any] = lambda server: None,
    ready: Callable[[str], Any] = lambda address: None,
) -> None:
    """Serves until Ctrl-C, a termination, or `should_exit` of what `started` is given. Answers that
    have a row are finished first; a second Ctrl-C does not wait for them.

    rows, queue, backend, reuse: see `Batch`. host, port: where to listen; port 0 takes a free one.
    ready: called with the address when connections are taken. Uvicorn raises SystemExit where
    the port cannot be had.
    """
    server = Server(served, key, local=is_loopback(host))
    server.batch = batch = Batch(
        served.model,
        server.publish,
        rows=rows,
        queue=queue,
        max_seq_len=served.max_seq_len,
        kv_cache=served.kv_cache,
        backend=backend,
        reuse=reuse,
    )
    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        limit_concurrency=rows + queue + SPARE_CONNECTIONS,
        server_header=False,
    )
    http = HttpServer(config, server, ready)
    before = sys.getswitchinterval()
    batch.start()
    try:
        sys.setswitchinterval(SWITCH_SECONDS)
        started(http)
        http.run()
    finally:
        sys.setswitchinterval(before)
        batch.stop()


def is_loopback(host: str) -> bool:
    """Whether a server on this host is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
