"""A process for each baseline, asked through a pipe: while one computes, the others sleep.

In one process the thread pools of torch and llama.cpp would spin against each other, and what one
of them allocates would be the other's memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import isa

# Workers fork from a process that has imported torch and nothing else, and started no thread.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])

# Read by the OpenMP of each library when it is loaded; torch's own is told in another way.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(Exception):
    """What failed in a worker; `kind` is the name of its exception."""

    def __init__(self, kind: str, text: str, details: str = "") -> None:
        super().__init__(f"{text}\n{details}" if details else text)
        self.kind, self.text = kind, text


class Worker:
    """`Worker(make, *args, threads=2)` runs `make(*args)` in a new process and keeps the result
    there; `worker.ask("method", …)` calls one of its methods and returns what that returns.

    Everything that goes through the pipe must pickle. Raises WorkerError when the call did.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, threads: int) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, isa.held_to(), make, args), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *args: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise WorkerError(
                "EOFError",
                f"a worker process ended with code {self._process.exitcode}; "
                "a negative code is a signal, and -9 usually means that memory ran out",
            ) from None
        if error is not None:
            raise WorkerError(*error)
        return answer

    @property
    def process(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_apart(function: Callable[..., Any], *args: Any, threads: int) -> Any:
    """What `function(*args)` returns, run in a process that ends with it."""
    with Worker(_Call, threads=threads) as worker:
        return worker.ask("run", function, args)


class _Call:
    def run(self, function: Callable[..., Any], args: tuple) -> Any:
        return function(*args)


def _serve(
    pipe: Connection, threads: int, held_to: str | None, make: Callable[..., Any], args: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    torch.set_num_threads(threads)
    if held_to is not None:
        isa.hold_our_kernels(held_to)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has closed the pipe
        baseline = _send_result(pipe, make, args, keep=True)
        while baseline is not None:
            method, args = pipe.recv()
            _send_result(pipe, getattr(baseline, method), args)


def _send_result(
    pipe: Connection, call: Callable[..., Any], args: tuple, keep: bool = False
) -> Any:
    """Sends (error, answer); with `keep` the answer stays here."""
    try:
        answer = call(*args)
    except Exception as error:
        pipe.send(((type(error).__name__, str(error), traceback.format_exc()), None))
        return None
    pipe.send((None, None if keep else answer))
    return answer
