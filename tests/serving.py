"""A server in a thread, for the tests of `llama_fast.serve`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

import llama_fast
from llama_fast import Llama
from llama_fast.generation import generate as generation
from llama_fast.generation.engine import Engine
from llama_fast.generation.generate import Completion
from llama_fast.serve.batch import Batch
from llama_fast.serve.requests import Served
from llama_fast.serve.server import run
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.chat_choice import chat_format

DEMO = Path(llama_fast.__file__).parent / "demo"


def demo(**given: Any) -> Served:
    """The demo model as it is served, of bfloat16 on the CPU kernels: there the bits of a row
    depend neither on the rows beside it nor on the parts in which its prompt is computed."""
    tokenizer = Tokenizer.from_pretrained(DEMO)
    model = Llama.from_pretrained(DEMO, device="cpu")
    format = chat_format(DEMO, tokenizer)
    settings = {"name": "demo", "max_seq_len": 512, "most_choices": 4}
    return Served(model=model, tokenizer=tokenizer, format=format, **settings | given)


def generate(served: Served, prompts: Any, **asked: Any) -> list[Completion]:
    """As `generate`; its prompts are multiplied in the order that the server's are."""
    inner = Engine.prefill

    def prefill(self: Engine, prompts: Any, first_row: int = 0, _: bool = True) -> Tensor:
        return inner(self, prompts, first_row, True)

    with mock.patch.object(Engine, "prefill", prefill):
        return generation.generate(served.model, served.tokenizer, prompts, **asked)


class Running:
    """A server that runs. url: where; batch: its batch."""

    def __init__(self) -> None:
        self.url = ""
        self.batch: Batch
        self.http: Any = None

    def end(self) -> None:
        """As Ctrl-C does."""
        self.http.should_exit = True


@contextmanager
def serving(served: Served, **settings: Any) -> Iterator[Running]:
    """Runs a server on a free port while the block lasts."""
    running, begun = Running(), threading.Event()

    def started(http: Any) -> None:
        running.http, running.batch = http, http._server.batch

    def ready(address: str) -> None:
        running.url = address
        begun.set()

    settings = {"rows": 4, "queue": 8} | settings
    thread = threading.Thread(
        target=run,
        args=(served,),
        kwargs=settings | {"started": started, "ready": ready, "port": 0},
    )
    thread.start()
    try:
        assert begun.wait(60), "the server has not begun"
        yield running
    finally:
        running.end()
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"
