"""Ops at the sizes of real models: our backends beside eager, torch.compile, torch and libraries.

    pytest benchmarks/ -k "swiglu and prefill" --shapes 1b,8b --benchmark-json out.json

A benchmark is a baseline; its group is a call of an op: the problem, the model's shape, what the
model is asked for, the dtype and the pass. A baseline that cannot serve the call is skipped, with
the reason; one whose result is wrong fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from benchmarks.conftest import DTYPES, MEASURED, SHAPES, WORK, chosen, play, rivals
from benchmarks.models import shape as shape_of
from llama_fast.bench import baselines
from llama_fast.bench import measure as speed
from llama_fast.bench.results import Row
from llama_fast.bench.roofline import Roofline
from llama_fast.bench.shapes import NAMES, Work, problem_shapes
from llama_fast.config.quantization import NAMED
from llama_fast.dispatch import BACKENDS, OPS, Op

# Of a model's several matrices the quick run takes one of each kind that differs, and of the forms
# of quantised weights all of the largest of a layer.
MATRICES = ("qkv", "gate_up", "head")
QUANTIZED = ("gate_up",)
# Which ops a model calls where: loss and gradients belong to training, the cache does not.
IN_TRAINING_ALONE = ("linear_cross_entropy",)


@dataclass(frozen=True)
class Case:
    problem: str
    shape: str
    work: Work
    dtype: str
    which: str  # the pass
    baseline: str

    @property
    def op(self) -> Op:
        return OPS[self.problem.split()[0]]

    @property
    def group(self) -> str:
        return f"{self.problem}, {self.shape}, {self.work}, {self.dtype}, {self.which}"

    def __str__(self) -> str:
        words = (*self.problem.split(), self.shape, self.work.name, self.dtype)
        return "-".join((*words, self.which.replace(" ", "-"), self.baseline.replace(" ", "-")))


def cases(config: pytest.Config) -> Iterator[Case]:
    option, full = config.getoption, config.getoption("--full")
    works = {
        "decode": Work.decode(option("--keys")),
        "prefill": Work.prefill(option("--tokens")),
        "training": Work.training(option("--tokens")),
    }
    for shape, kind, dtype, name in itertools.product(
        chosen(config, "--shapes", "1b", SHAPES),
        chosen(config, "--work", WORK, WORK),
        chosen(config, "--dtypes", "bfloat16", DTYPES),
        NAMES,
    ):
        op, work = OPS[name], works[kind]
        if kind == "training" and op.gradient is None:
            continue
        if kind != "training" and name in IN_TRAINING_ALONE:
            continue
        which = speed.passes(op)[-1] if kind == "training" else speed.FORWARD
        for problem in problem_shapes(name, shape_of(shape), work):
            if full or _quick(problem, kind):
                for baseline in (*BACKENDS, *baselines.peers(op)):
                    yield Case(problem, shape, work, dtype, which, baseline)


def _quick(problem: str, kind: str) -> bool:
    op, *words = problem.split()
    if op != "linear":
        return kind != "training" or not set(words) & set(OPS[op].forward_only)
    matrix, quantized = words[0], words[-1] in NAMED
    if "swiglu" in words:  # quantised, its gradients are those of the two ops that it is
        return not quantized or kind != "training"
    if quantized:
        return matrix in QUANTIZED and (kind != "training" or words[-1] == "int8")
    # Of a prompt the head sees the last token alone; its gradients are linear_cross_entropy's.
    return matrix in (MATRICES if kind == "decode" else MATRICES[:2])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", list(cases(metafunc.config)), ids=str)


@dataclass
class Measured:
    """Of a group: its row, why some baselines cannot take part, and what others raised."""

    row: Row
    refused: dict[str, list[str]]
    failed: dict[str, Exception]


_measured: dict[str, Measured] = {}


def measured(case: Case, request: pytest.FixtureRequest, limits: Roofline) -> Measured:
    """The group's, which its first test makes."""
    if case.group in _measured:
        return _measured[case.group]
    option, gradient = request.config.getoption, case.which != speed.FORWARD
    make = problem_shapes(
        case.op.name,
        shape_of(case.shape),
        case.work,
        dtype=getattr(torch, case.dtype),
        device=option("--device"),
        gradient=gradient,
    )[case.problem]
    args = make(0)
    refused = {
        name: baselines.why_not(name, case.op, args, gradient=gradient) for name in rivals(request)
    }
    failed: dict[str, Exception] = {}
    row = speed.measure(
        case.problem,
        make,
        [name for name, why in refused.items() if not why],
        shape=case.shape,
        work=case.work,
        roofline=limits,
        which=case.which,
        rounds=option("--rounds"),
        thorough=True,
        failed=failed,
    )
    refused |= {name: [why] for name, why in row.missing.items()}
    _measured[case.group] = Measured(row, refused, failed)
    return _measured[case.group]


@MEASURED
def test_op(benchmark, case, limits, request) -> None:
    found = measured(case, request, limits)
    if case.baseline in found.failed:
        raise found.failed[case.baseline]
    if why := found.refused[case.baseline]:
        pytest.skip(f"{case.baseline} cannot serve {case.group}: {'; '.join(why)}")
    play(benchmark, found.row, case.baseline, case.group)
