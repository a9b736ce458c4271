"""Makes many answers at once: a loop in a thread of its own over the rows of one engine.

Each turn of the loop takes requests from the queue into rows that are free, computes some tokens of
their prompts, and then makes one step of all rows that answer. A row's tokens depend on its own
request: it has its own sampling, seed, stop strings and grammar (`Rows`, as in `generate`). Rows
that are free, or whose prompt is only half computed, are held (`Engine.hold`), so steps leave them
alone; the lowest rows are taken first, and a step computes only as many as it needs.

The row of an answer that has ended keeps its tokens. A request whose prompt begins with them goes
on from there, as the next turn of a dialog does.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..dispatch import use_backend
from ..errors import BusyError, LlamaFastError
from ..generation.engine import Engine, captured_batch_size
from ..generation.follow import acquire
from ..generation.grammar import allowed_by
from ..generation.not_finite import not_finite
from ..model import Llama
from ..utils.sequences import common_beginning
from .job import Job, Piece
from .metrics import Metrics

# Tokens of prompts that are computed between two steps of the rows that answer.
PREFILL_TOKENS = 512
# Prompts are padded to the longest beside them: up to so many times their tokens.
LARGEST_PADDING = 1.5
# A common beginning shorter than this is computed again: the lowest free row is worth more.
LEAST_REUSED = 32

Publish = Callable[[list[tuple[Job, Piece]]], None]


class _Row:
    """A row of the engine. tokens: those whose keys and values it holds, or may be resumed with.
    drawn: the token that the next step takes; None while the prompt is not computed."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.job: Job | None = None
        self.tokens: list[int] = []
        self.drawn: int | None = None


class Batch:
    """Answers jobs, up to `rows` at once, while up to `queue` wait.

    publish: is called with the new pieces of a turn, in the batch's thread and at the end also in
    the one that calls `drain`. max_seq_len: tokens of a row, prompt and answer. kv_cache: as in
    `generate`. backend: asked for strictly, as by `use_backend`. reuse: keep the tokens of rows
    that have ended.
    """

    def __init__(
        self,
        model: Llama,
        publish: Publish,
        *,
        rows: int = 16,
        queue: int = 64,
        max_seq_len: int | None = None,
        kv_cache: str | None = None,
        backend: str | None = None,
        reuse: bool = True,
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.publish = model, publish
        self.max_seq_len = max_seq_len or model.config.max_seq_len
        self.kv_cache, self.backend, self.reuse = kv_cache, backend, reuse
        self.queue = queue
        self.metrics = metrics or Metrics()
        self._rows = [_Row(index) for index in range(rows)]
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()  # guards what is below, and the queue
        self._draining = self._aborted = False
        self._ready = threading.Event()
        self._failed: Exception | None = None
        self._new: list[tuple[Job, Piece]] = []
        self._thread = threading.Thread(target=self._run, name="llama-fast batch", daemon=True)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def rows_in_use(self) -> int:
        return sum(row.job is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def failed(self) -> Exception | None:
        """What ended the loop, where that was an error."""
        return self._failed

    def start(self) -> None:
        """Begins; returns when the cache is there. Raises what making it raises."""
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all of the jobs into the queue, or none: raises BusyError where there is no room, or
        the batch is at its end."""
        with self._changed:
            if self._draining or self._failed is not None:
                raise BusyError("the server is shutting down; ask another one")
            idle = sum(row.job is None for row in self._rows)
            room = self.queue + idle - len(self._waiting)
            if len(jobs) > room:
                raise BusyError(
                    f"{len(self._waiting)} answers wait already, and the queue holds {self.queue}; "
                    "ask again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends the jobs: their rows are free at the next turn. Those that have ended stay so."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self._changed.notify()

    def drain(self) -> None:
        """Answers no more than what has a row: what waits gets a BusyError."""
        with self._changed:
            self._draining = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        if waiting:
            error = BusyError("the server is shutting down; ask another one")
            self.publish([(job, Piece(error=error)) for job in waiting])

    def stop(self) -> None:
        """Ends at once, after the step that runs, whatever has not been answered."""
        self.drain()
        with self._changed:
            self._aborted = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # In the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asked = use_backend(self.backend, strict=True) if self.backend else nullcontext()
            with (
                asked,
                torch.inference_mode(),
                acquire(self.model, self.rows, self.max_seq_len, self.kv_cache) as engine,
            ):
                for row in self._rows:
                    engine.hold(row.index)
                self._ready.set()
                while self._wait():
                    self._turn(engine)
                    self._publish()
        except Exception as error:  # of the engine itself; those of an answer are its own
            if self._ready.is_set():
                traceback.print_exception(error)
            self._failed = error
            self._ready.set()
        finally:
            self.drain()
            ended = BusyError("the server has stopped before the answer was whole")
            for row in self._rows:
                if row.job is not None:
                    self._new.append((row.job, Piece(error=self._failed or ended)))
                    row.job = None
            self._publish()

    def _wait(self) -> bool:
        """Waits for work; whether there is any more."""
        with self._changed:
            while not self._aborted:
                if self._waiting or any(row.job for row in self._rows):
                    return True
                if self._draining:
                    return False
                self._changed.wait()
            return False

    def _turn(self, engine: Engine) -> None:
        for row in self._rows:
            if row.job is not None and row.job.cancelled:
                self._retire(engine, row)
        budget = PREFILL_TOKENS
        while budget > 0 and (rows := self._filling() or self._admit(budget)):
            budget -= self._fill(engine, rows, budget)
        answering = [row for row in self._rows if row.drawn is not None]
        if answering:
            self._step(engine, answering)

    def _publish(self) -> None:
        new, self._new = self._new, []
        new = [(job, piece) for job, piece in new if not job.cancelled]
        if new:
            self.publish(new)

    def _filling(self) -> list[_Row]:
        """The row whose prompt is not all computed, if there is one; there is one at most."""
        return [row for row in self._rows if row.job and row.drawn is None][:1]

    def _admit(self, budget: int) -> list[_Row]:
        """Gives requests that wait a row each, as many as are to be computed at once: one; or where
        it begins anew, also those behind it that do, have the next rows free, and fit."""
        rows: list[_Row] = []
        with self._changed:
            while self._waiting:
                job = self._waiting[0]
                row, kept = self._row_for(job)
                if row is None or (rows and not _beside(rows, row, kept, job, budget)):
                    break
                self._waiting.popleft()
                row.job = job
                del row.tokens[kept:]
                job.reused = kept
                rows.append(row)
                if kept:
                    break
        self.metrics.count("prompt_tokens", sum(len(row.job.ids) for row in rows))
        self.metrics.count("reused_tokens", sum(row.job.reused for row in rows))
        return rows

    def _row_for(self, job: Job) -> tuple[_Row | None, int]:
        """The free row that holds most of a prompt's beginning, and how many tokens of it; the
        lowest one, and 0, where that is too little. None where no row is free."""
        free = [row for row in self._rows if row.job is None]
        common = [common_beginning(row.tokens, job.ids[:-1]) for row in free]
        most = max(common, default=0)
        if most >= LEAST_REUSED:
            return free[common.index(most)], most
        return (free[0] if free else None), 0

    def _fill(self, engine: Engine, rows: list[_Row], budget: int) -> int:
        """Computes up to `budget` more tokens of a row's prompt, or the whole prompts of several
        rows; returns how many, padding included. After the last token of a prompt the first one of
        its answer is drawn."""
        parts = []
        for row in rows:
            held = len(row.tokens)
            parts.append(row.job.ids[held : held + budget])
            engine.resume(row.index, held)
        computed = len(parts) * max(map(len, parts))
        try:
            logits = engine.prefill(parts, rows[0].index, True)
        except Exception as error:  # out of memory, a kernel: the other rows go on
            for row in rows:
                self._end(engine, row, error)
            return computed
        for row, part in zip(rows, parts, strict=True):
            row.tokens += part
        if len(rows[0].tokens) < len(rows[0].job.ids):
            engine.hold(rows[0].index)
        else:
            self._draw(engine, dict(enumerate(rows)), logits)
        return computed

    def _step(self, engine: Engine, rows: list[_Row]) -> None:
        """Makes one step of the rows that answer, and draws a token of each."""
        n = min(captured_batch_size(rows[-1].index + 1), self.rows)
        tokens = [0] * n
        for row in rows:
            tokens[row.index] = row.drawn
        try:
            where = engine.cache.lengths.device
            logits = engine.step_first(torch.tensor(tokens, device="cpu").to(where))
        except Exception as error:
            for row in rows:
                self._end(engine, row, error)
            return
        for row in rows:
            row.tokens.append(row.drawn)
        self._draw(engine, {row.index: row for row in rows}, logits)

    def _draw(self, engine: Engine, rows: dict[int, _Row], logits: Tensor) -> None:
        """Draws a token of each row, and hands it on; rows by their place in the logits (N,V)."""
        allowed = {}
        for place, row in rows.items():
            try:
                allowed[place] = allowed_by(row.job.matcher)
            except LlamaFastError as error:  # a grammar that fails ends its answer alone
                self._end(engine, row, error)
        places = list(allowed)
        if not places:
            return
        jobs = [rows[place].job for place in places]
        drawn = jobs[0].rows.drawer.draw(
            logits,
            list(allowed.values()),
            [job.sampling for job in jobs],
            [job.rows.generators[0] for job in jobs],
            rows=None if places == list(range(len(logits))) else places,
            top=max(job.top for job in jobs),
        )
        tokens, scores = drawn.tokens.tolist(), drawn.logprobs.tolist()
        for n, place in enumerate(places):
            row, top = rows[place], ()
            if jobs[n].top:
                top = zip(*(of[n, : jobs[n].top].tolist() for of in drawn.top), strict=True)
            try:
                if not math.isfinite(scores[n]):
                    (own,) = jobs[n].rows.drawer.whole(logits, [place])
                    raise not_finite(self.model, own, f"token {jobs[n].made + 1} of an answer")
                self._take(engine, row, tokens[n], scores[n], tuple(top))
            except LlamaFastError as error:
                self._end(engine, row, error)
        self.metrics.count("generated_tokens", len(places))

    def _take(
        self,
        engine: Engine,
        row: _Row,
        token: int,
        score: float,
        top: tuple[tuple[int, float], ...],
    ) -> None:
        """Adds a token to the text of its row. Raises PromptError."""
        job = row.job
        job.made += 1
        text, reason = job.rows.finish(0, token, job.made)
        if job.ends is not None and job.ends(token, text):
            reason = reason or "stop"
        if job.made == 1:
            self.metrics.observe("time_to_first_token", time.perf_counter() - job.submitted)
        self._new.append((job, Piece(token, text, score, top, reason)))
        row.drawn = token
        if reason:
            self._retire(engine, row)

    def _end(self, engine: Engine, row: _Row, error: Exception) -> None:
        """Ends an answer with an error."""
        self._new.append((row.job, Piece(error=error)))
        self._retire(engine, row)

    def _retire(self, engine: Engine, row: _Row) -> None:
        """Frees a row; it is held, with the tokens that are computed."""
        row.job, row.drawn = None, None
        engine.hold(row.index)
        if not self.reuse:
            row.tokens.clear()


def _beside(rows: list[_Row], row: _Row, kept: int, job: Job, budget: int) -> bool:
    """Whether a prompt in `row` is computed together with those of `rows`: a batch of rows in
    their order, in which all are padded to the longest."""
    lengths = [len(one.job.ids) for one in rows] + [len(job.ids)]
    padded = max(lengths) * len(lengths)
    return (
        not kept
        and row.index == rows[-1].index + 1
        and padded <= min(budget, LARGEST_PADDING * sum(lengths))
    )
