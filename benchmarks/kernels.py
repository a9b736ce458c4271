"""Rows of single ops: attention beside SDPA, the memory-bound ops beside torch.compile and a copy,
and what a call costs. Each function runs in a process of its own and returns what it found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import llama_fast.ops  # noqa: F401  registers the ops
from benchmarks import elementwise
from llama_fast.bench.measure import TOLERANCE
from llama_fast.bench.oracle import distance, outputs
from llama_fast.bench.results import COPY, MULTIPLY_ADDS, OURS, READ
from llama_fast.bench.roofline import multiply_adds, plain_read
from llama_fast.bench.shapes import Work, problem_shapes
from llama_fast.bench.timing import OtherPrograms, interleaved
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, Op, use_backend
from llama_fast.errors import WrongResultError

# Caches that one query visits in turn, as those of a model's layers: more than a cache can hold.
LAYERS = 16


class Found(NamedTuple):
    """samples  seconds of each baseline
    others   part of the processors' time that other programs took meanwhile
    bytes, flops  of one sample of ours"""

    samples: dict[str, list[float]]
    others: float | None
    bytes: int
    flops: int


@contextmanager
def _ours_only() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad(), use_backend("cpu", strict=True):
        yield


def _check(name: str, found: Any, expected: tuple[torch.Tensor, ...], op: Op) -> None:
    """Raises WrongResultError unless the results agree: a wrong one has no time."""
    error, bound = distance(outputs(op, found), expected), TOLERANCE[torch.bfloat16]
    if not error <= bound:
        raise WrongResultError(
            f"{name} is {error:.2g} of its size away from the eager definition; "
            f"at most {bound} is rounding"
        )


def attention(rounds: int, config: LlamaConfig, work: Work, layers: int) -> Found:
    """bfloat16, causal; a sample visits each layer once. One query takes turns with a plain read of
    as many bytes, a prompt with as many multiply-adds."""
    op = OPS["attention"]
    with _ours_only():
        make = problem_shapes("attention", config, work)["attention"]
        inputs = [make(layer) for layer in range(layers)]

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            causal = work.tokens > 1
            return F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)

        def each(call: Callable[..., Any]) -> Callable[[], None]:
            def visit() -> None:
                for args in inputs:
                    call(*args)

            return visit

        expected = outputs(op, op.eager(*inputs[0]))
        _check("attention", op(*inputs[0]), expected, op)
        _check("SDPA", sdpa(*inputs[0]).transpose(1, 2), expected, op)
        cost = op.cost(*inputs[0])
        if work.tokens == 1:
            yardstick = {READ: plain_read(layers * cost.bytes)}
        else:
            yardstick = {MULTIPLY_ADDS: multiply_adds(layers * cost.flops, pairs=True)}
        calls = {OURS: each(op), "SDPA": each(sdpa), **yardstick}
        with OtherPrograms([os.getpid()]) as others:
            samples = interleaved(calls, rounds)
    return Found(samples, others.share, layers * cost.bytes, layers * cost.flops)


def memory_bound(rounds: int, name: str, size: elementwise.Size, repeat: int) -> Found:
    """bfloat16; a sample is `repeat` calls. "copy" moves as many bytes as the op must."""
    op = OPS[name]
    with _ours_only():
        args = elementwise.arguments(name, torch.bfloat16, size)
        _check(name, op(*args), outputs(op, op.eager(*args)), op)
        named = {"ours": OURS, "compile": "torch.compile", "copy": COPY}

        def repeated(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(repeat):
                    call()

            return run

        each = elementwise.baselines(op, torch.bfloat16, size)
        calls = {named[key]: repeated(call) for key, call in each.items()}
        for call in calls.values():  # compiling is left out of what is watched
            call()
        with OtherPrograms([os.getpid()]) as others:
            samples = interleaved(calls, rounds)
        cost = op.cost(*args)
    return Found(samples, others.share, repeat * cost.bytes, repeat * cost.flops)


def call_costs(rounds: int, names: tuple[str, ...]) -> tuple[dict[str, list[float]], float | None]:
    """Microseconds of processor time of a call without gradient, by op; and `others` as above."""
    found = {}
    with _ours_only(), OtherPrograms([os.getpid()]) as others:
        for name in names:
            seconds = elementwise.call_costs(OPS[name], torch.bfloat16, rounds + 1)[1:]
            found[name] = [1e6 * x for x in seconds]
    return found, others.share
