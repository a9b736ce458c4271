"""Ops at the sizes of real models: each backend, eager, torch.compile of it, and torch's own.

    pytest benchmarks/ -k "swiglu and prefill" --shapes 1b,8b --benchmark-json out.json

A round is one call (of the backward pass alone, where it is that which is timed), on other tensors
than the round before, so that they come from memory as they do in a model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast import speed
from llama_fast.ceilings import BYTES
from llama_fast.config import LlamaConfig
from llama_fast.errors import BackendError
from llama_fast.registry import BACKENDS, OPS, Op, use_backend
from llama_fast.workloads import NAMES, Work, workloads
from tests.ops.oracle import to_float64

DTYPE = torch.bfloat16
SECONDS = 1.0  # that a benchmark is to take, in 5 to 50 rounds
SETS = 16  # of arguments, at most
# One matrix stands for all where a model has several of a kind.
MATRICES = ("qkv", "gate_up", "head")
COMPILED = ("rms_norm", "add_rms_norm", "swiglu", "rope")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(*heads_first, is_causal=q.shape[1] > 1, enable_gqa=True)
    return o.transpose(1, 2)


# What a user would call instead, where torch has it in one function.
TORCH = {"rms_norm": _rms_norm, "attention": _attention}


@dataclass(frozen=True)
class Case:
    workload: str
    shape: str
    work: Work
    contender: str  # a backend, "torch" or "compile"
    backward: bool

    @property
    def op(self) -> Op:
        return OPS[self.workload.split()[0]]

    @property
    def group(self) -> str:
        passes = "backward" if self.backward else "forward"
        return f"{self.workload}, {self.shape}, {self.work}, {passes}"

    def __str__(self) -> str:
        passes = "backward" if self.backward else "forward"
        words = (*self.workload.split(), self.shape, self.work.name, passes, self.contender)
        return "-".join(words)

    def call(self) -> Callable[..., Any]:
        if self.contender == "torch":
            return TORCH[self.op.name]
        if self.contender == "compile":
            return torch.compile(self.op.eager)

        def run(*args: Any) -> Any:
            with use_backend(self.contender, strict=True):
                return self.op(*args)

        return run


def contenders(op: Op, backward: bool) -> list[str]:
    names = list(BACKENDS)
    if op.name in TORCH:
        names.append("torch")
    if op.name in COMPILED and not backward:
        names.append("compile")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    works = [Work.decode(option("--keys")), Work.prefill(option("--tokens"))]
    cases = []
    for shape, work, name in itertools.product(option("--shapes").split(","), works, NAMES):
        for workload in workloads(name, LlamaConfig.preset(shape), work, dtype=DTYPE):
            kind = workload.split()[1:2]
            if kind and kind[0] not in (MATRICES if work.tokens == 1 else MATRICES[:2]):
                continue  # of a prompt the head sees the last token alone
            if name == "linear_quantized" and kind != ["gate_up"]:
                continue
            backwards = (False, True) if OPS[name].gradient and work.tokens > 1 else (False,)
            for backward in backwards:
                cases += [
                    Case(workload, shape, work, contender, backward)
                    for contender in contenders(OPS[name], backward)
                ]
    metafunc.parametrize("case", cases, ids=str)


def test_op(benchmark, case, limits) -> None:
    op, work = case.op, case.work
    config = LlamaConfig.preset(case.shape)
    make = workloads(op.name, config, work, dtype=DTYPE, gradient=case.backward)[case.workload]
    args = make(0)
    if case.contender in BACKENDS and (why := speed.why_not(op, args, case.contender)):
        pytest.skip(f"{case.contender} cannot serve {case.workload}: {'; '.join(why)}")
    call = case.call()
    cost = op.cost(*args)
    with torch.no_grad():
        expected = speed.outputs(op, op.eager(*to_float64(args)))
        error = speed.distance(speed.outputs(op, call(*make(0))), expected)
    # How far rounding may take a kernel is for tests/ops to judge; here, another result is refused.
    assert error < speed.TOLERANCE[DTYPE], f"{case} is {error:.2g} of its size from float64"
    bound, seconds = speed.at_best(op, cost, expected, DTYPE, limits)
    benchmark.group = case.group
    benchmark.extra_info.update(
        op=op.name,
        workload=case.workload,
        shape=case.shape,
        work=str(work),
        contender=case.contender,
        dtype=str(DTYPE),
        threads=torch.get_num_threads(),
        error_against_float64=error,
    )
    if not case.backward:
        benchmark.extra_info.update(
            bytes=cost.bytes, flops=cost.flops, ceiling=bound, seconds_at_ceiling=seconds
        )
    sets = max(1, min(SETS, BYTES // max(1, cost.bytes)))
    inputs = itertools.cycle([args, *(make(seed) for seed in range(1, sets))])
    if case.backward:
        _time(benchmark, torch.autograd.grad, lambda: forward(op, call, next(inputs)))
    else:
        with torch.no_grad():
            _time(benchmark, call, lambda: next(inputs))


def _time(benchmark, call: Callable[..., Any], make: Callable[[], tuple]) -> None:
    """As many rounds as fill the time, each with arguments of its own."""
    try:
        call(*make())
    except BackendError as error:
        pytest.skip(str(error))
    args = make()
    start = time.perf_counter()
    call(*args)
    rounds = max(5, min(50, int(SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(call, setup=lambda: (make(), {}), rounds=rounds)


def forward(op: Op, call: Callable[..., Any], args: tuple) -> tuple[tuple, list, list]:
    """What torch.autograd.grad takes: the outputs, the inputs with a gradient, random gradients."""
    args = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.dtype is DTYPE else x
        for x in args
    )
    found = speed.outputs(op, call(*args))
    wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    return found, wanted, [torch.randn_like(x) for x in found]
