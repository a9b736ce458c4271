"""How fast each baseline serves an op, beside the eager reference and the machine's peak rates.

The baselines take turns, round by round. On the CPU the arguments change from call to call, so
that they come from memory as they do in a model, unless they are to be warm; on a GPU its cache is
emptied between calls. An output that is not the reference's is an error, not a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..dispatch import OPS, Cost, Op, wrapped_launches
from ..errors import BackendError, FallbackWarning, WrongResultError
from . import baselines
from .memory import extra_memory
from .oracle import (
    BACKWARD,
    BOTH,
    FORWARD,
    distance,
    gradients_of,
    outputs,
    reference,
    with_leaves,
)
from .results import COPY, READ, Row
from .roofline import BYTES, Roofline
from .roofline_gpu import plain_copy, plain_read
from .shapes import Work, problem_shapes
from .timing import OtherPrograms, interleaved, interleaved_on_gpu

SAMPLE = 0.02  # seconds that one sample takes at least on a CPU, in as many calls as that needs
ROUNDS_ON_GPU = 6  # of one call each, for every sample asked for
PATIENCE = 10.0  # seconds of all rounds together: of what takes longer there are fewer,
FEWEST_ROUNDS = 3  # but not fewer than these
SETS = 64  # of arguments, at most
# On a GPU, what stands for a peak rate of memory: a baseline's name, and what makes its call.
YARDSTICKS_ON_GPU = {"read": (READ, plain_read), "copy": (COPY, plain_copy)}
# Of an output's own root mean square, by the dtype: rounding, not another result.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# What a call costs besides its kernel is timed on a model as small as this.
SMALL = LlamaConfig(
    dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=64, vocab_size=64
)


def passes(op: Op) -> tuple[str, ...]:
    """Those of an op that can be timed."""
    if op.gradient is None:
        return (FORWARD,)
    return (FORWARD, BOTH if op.gradient_in_forward else BACKWARD)


def measure(
    problem: str,
    make: Callable[[int], tuple],
    names: Sequence[str],
    *,
    shape: str,
    work: Work,
    roofline: Roofline,
    which: str = FORWARD,
    rounds: int = 5,
    warm: bool = False,
    thorough: bool = False,
    failed: dict[str, Exception] | None = None,
    others: Mapping[str, baselines.Call] | None = None,
) -> Row:
    """Times baselines (`llama_fast.bench.baselines`) on one of `llama_fast.bench.shapes`.

    which     one of `passes(op)`; backward is the gradients of random gradients of the outputs
    warm      the same arguments in every call, so that they may lie in a cache
    thorough  also the host's time of a call, and the memory that it takes
    failed    takes the exceptions of baselines that fail or are wrong; the others are timed
    others    more baselines: functions of the op's arguments
    A backend that cannot serve the pass goes to the row's `missing`.
    Raises WrongResultError for an output that is not the eager reference's, and whatever else a
    baseline raises, where there is no `failed` to take it.
    """
    op = OPS[problem.split()[0]]
    first = make(0)

    def untouched() -> tuple:
        return make(0) if op.writes else first

    floats = next(x for x in first if isinstance(x, Tensor) and x.is_floating_point())
    dtype, device = floats.dtype, floats.device
    results = outputs(op, op.fake(*first))  # memory of their shapes, not what is in it
    least = cost(op, untouched(), which)
    row = _row(problem, shape, work, dtype, which, warm, least)
    expected = reference(op, untouched(), which)
    once: dict[str, _Call] = {}
    others = others or {}
    for name in (*names, *others):
        try:
            # The first call compiles, where there is something to compile.
            found = _Call(op, others.get(name) or baselines.call(name, op), [untouched()], which)
            row.errors[name] = _error(found, name, expected, dtype)
            once[name] = found
        except BackendError as error:  # such as one without a kernel for the backward pass
            row.missing[name] = str(error)
        except Exception as error:
            if failed is None:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                error = error.with_traceback(None)  # whose frames would hold the memory
            failed[name] = error
    del expected
    row.bound, row.at_best = at_best(first, least, results, dtype, roofline)
    if not once:
        return row
    if device.type == "cuda":
        _time_on_gpu(row, once, rounds, warm, device)
    else:
        sets = 1 if warm else max(1, min(SETS, BYTES // max(1, least.bytes)))
        inputs = [first, *(make(seed) for seed in range(1, sets))]
        _time_on_cpu(row, op, once, inputs, which, rounds)
        if thorough and which == FORWARD:
            for name in once:
                # torch.compile would compile anew for the small shape.
                if name == baselines.COMPILED or name in others:
                    continue
                if host := host_seconds(problem, name, dtype):
                    row.host[name] = host
    if thorough:
        for name, call in once.items():
            call.prepare()
            if (extra := extra_memory(call, device)) is not None:
                row.memory[name] = extra
    return row


def _row(
    problem: str,
    shape: str,
    work: Work,
    dtype: torch.dtype,
    which: str,
    warm: bool,
    least: Cost,
) -> Row:
    kind = str(dtype).removeprefix("torch.")
    words = [problem, shape, str(work), kind, which, *(["warm"] if warm else [])]
    return Row(
        name=", ".join(words),
        what=", ".join(words),
        unit="GB/s",
        work=least.bytes / 1e9,
        call={
            "op": problem.split()[0],
            "problem": problem,
            "shape": shape,
            "work": work.name,
            **{key: value for key, value in dataclasses.asdict(work).items() if key != "name"},
            "dtype": kind,
            "pass": which,
            "warm": warm,
        },
        bytes=least.bytes,
        flops=least.flops,
    )


def _time_on_gpu(
    row: Row, once: dict[str, _Call], rounds: int, warm: bool, device: torch.device
) -> None:
    """What moves as many bytes takes turns with them, and says what the memory allows: starting and
    ending are a part of a short call, and none of a peak rate's."""
    rounds = _rounds_on_gpu(once, rounds, device)
    calls: dict[str, Callable[[], object]] = dict(once)
    name, yardstick = YARDSTICKS_ON_GPU.get(row.bound, ("", None))
    if yardstick is not None and row.at_best is not None and not warm:
        calls[name] = yardstick(row.bytes, device)
    times = interleaved_on_gpu(calls, rounds, warm=warm)
    row.samples = times.seconds
    row.host = {who: statistics.median(times.host[who]) for who in once}
    if name in calls:
        row.at_best = row.seconds(name)


def _rounds_on_gpu(calls: dict[str, _Call], rounds: int, device: torch.device) -> int:
    start = time.perf_counter()
    for call in calls.values():
        call.prepare()
        call()
    torch.cuda.synchronize(device)
    one_round = time.perf_counter() - start
    return max(FEWEST_ROUNDS, min(ROUNDS_ON_GPU * rounds, int(PATIENCE / one_round)))


def _time_on_cpu(
    row: Row,
    op: Op,
    once: dict[str, _Call],
    inputs: list[tuple],
    which: str,
    rounds: int,
) -> None:
    # Graphs of as many calls as a sample has are held at once.
    most = None if which == FORWARD else max(1, BYTES // max(1, row.bytes))
    calls = {name: _Call(op, first.call, inputs, which) for name, first in once.items()}
    with OtherPrograms([os.getpid()]) as others:
        first = {name: call.repeat(SAMPLE, most) for name, call in calls.items()}
        one_round = sum(first.values())
        rounds = min(rounds, max(FEWEST_ROUNDS, int(PATIENCE / one_round)))
        # Of what takes seconds, that was a round already.
        begun = [first] if one_round > PATIENCE else []
        seconds = interleaved(calls, rounds - len(begun), warm_up=False)
    row.others = others.share
    row.samples = {
        name: [value / calls[name].count for value in (*(one[name] for one in begun), *values)]
        for name, values in seconds.items()
    }


class _Call:
    """`count` calls of a baseline, each with the next arguments; what a backward pass needs is
    made by `prepare`, outside of the time."""

    def __init__(self, op: Op, call: Callable[..., Any], inputs: list[tuple], which: str) -> None:
        self.op, self.call, self.which, self.count = op, call, which, 1
        self.next = itertools.cycle(inputs).__next__
        self.ready: list[tuple] = []

    def prepare(self) -> None:
        if self.which == BACKWARD:
            self.ready = [self._graph(self.next()) for _ in range(self.count)]

    def __call__(self) -> Any:
        found = None
        if self.which == FORWARD:
            with torch.no_grad():
                for _ in range(self.count):
                    found = self.call(*self.next())
        elif self.which == BACKWARD:
            for graph in self.ready:
                found = torch.autograd.grad(*graph)
            self.ready = []
        else:
            for _ in range(self.count):
                loss, leaves, _ = self._graph(self.next())
                found = (*loss, *torch.autograd.grad(loss[0], leaves))
        return found

    def _graph(self, args: tuple) -> tuple[tuple, list, tuple]:
        """What torch.autograd.grad takes: the outputs, the inputs with a gradient, gradients."""
        args, leaves = with_leaves(self.op, args)
        found = outputs(self.op, self.call(*args))
        return found, leaves, gradients_of(found)

    def repeat(self, seconds: float, most: int | None) -> float:
        """Sets `count` so that all its calls take that long; returns how long they took."""
        while True:
            self.prepare()
            start = time.perf_counter()
            self()
            took = time.perf_counter() - start
            if took >= seconds or self.count == most:
                return took
            count = max(2 * self.count, int(self.count * seconds / took))
            self.count = count if most is None else min(most, count)


def _error(call: _Call, name: str, expected: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    call.prepare()
    found = call()
    if call.which == FORWARD:
        found = outputs(call.op, found)
    error = distance(found, expected)
    if not error <= TOLERANCE[dtype]:
        raise WrongResultError(
            f"{call.op.name} ({call.which}) by {name} is {error:.2g} of its size away from the "
            f"eager reference; at most {TOLERANCE[dtype]:g} is rounding, so its time means nothing"
        )
    return error


def cost(op: Op, args: tuple, which: str) -> Cost:
    """What a pass must move and compute at least: a backward pass what the ops do that it calls. No
    kernel runs for it."""
    if which != BACKWARD:
        return op.cost(*args)
    counted: list[Cost] = []

    def count(called: Op, backend: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            counted.append(called.cost(*args))
            return called.fake(*args)

        return counting

    call = _Call(op, op, [args], which)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        call.prepare()
        with wrapped_launches(count):
            call()
    return Cost(sum(one.bytes for one in counted), sum(one.flops for one in counted))


def at_best(
    args: tuple,
    least: Cost,
    results: tuple[Tensor, ...],
    dtype: torch.dtype,
    roofline: Roofline,
) -> tuple[str, float | None]:
    """The peak rate that bounds a call, and the seconds that it takes there.

    What writes much is bounded by a copy, what hardly writes by a read. The rate of 8-bit
    multiply-adds is not among the peak rates: a call of quantised weights that it would bound has
    none.
    """
    written = sum(result.numel() for result in results) * dtype.itemsize
    memory = "copy" if written > least.bytes / 4 else "read"
    halves = (torch.bfloat16, torch.float16) if results[0].is_cuda else (torch.bfloat16,)
    arithmetic = "bfloat16" if dtype in halves else "float32"
    bandwidth, rate = getattr(roofline, memory), getattr(roofline, arithmetic)
    moving = least.bytes / bandwidth if bandwidth else None
    computing = least.flops / rate if rate else None
    if computing is None or moving is None or moving >= computing:
        return memory, moving
    if any(isinstance(x, Tensor) and x.dtype is torch.uint8 for x in args):
        return "int8", None
    return arithmetic, computing


def host_seconds(problem: str, name: str, dtype: torch.dtype, most: int = 200) -> float | None:
    """Processor time of a call with next to nothing to compute, the least of some batches; None
    where the baseline does not serve a shape so small."""
    op = OPS[problem.split()[0]]
    args = problem_shapes(op.name, SMALL, Work.decode(8), dtype=dtype)[problem](0)
    if baselines.why_not(name, op, args):
        return None
    call = baselines.call(name, op)
    best = float("inf")
    with torch.no_grad():
        start = time.process_time()
        call(*args)
        calls = max(1, min(most, int(SAMPLE / max(1e-9, time.process_time() - start))))
        for _ in range(4):
            start = time.process_time()
            for _ in range(calls):
                call(*args)
            best = min(best, (time.process_time() - start) / calls)
    return best
