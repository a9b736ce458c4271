"""AMX differs from AVX512_BF16 in its products of matrices alone, so it is tested on these; some
tests of linear and attention have it among their backends too. On a CPU with AMX the kernels run
themselves, elsewhere emulated."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch

from llama_fast import batch_invariant
from llama_fast.backends import cpu
from llama_fast.dispatch import OPS, use_backend

from ..ops.oracle import Expected, assert_accurate, of_op, run_poisoned
from . import emulation

pytestmark = pytest.mark.skipif(
    bool(emulation.why_no_x86_compiler()), reason=emulation.why_no_x86_compiler() or "it runs"
)

CASES = [
    pytest.param(op, case, id=f"{op.name}-{case}")
    for op in (OPS["linear"], OPS["attention"])
    for case in op.cases()
    if torch.bfloat16 in case.dtypes
]


def arguments(case) -> tuple:
    return case.make(torch.Generator().manual_seed(0), torch.bfloat16, "cpu")


@functools.lru_cache(maxsize=1)  # both modes of a case follow on one another
def expected_results(op, case) -> list[Expected]:
    return of_op(op, arguments(case))


@pytest.mark.parametrize("mode", [nullcontext, batch_invariant])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_cases(op, case, mode):
    args = arguments(case)
    with emulation.use_isa_anyhow(emulation.AMX), use_backend("cpu", strict=True), mode():
        actual = run_poisoned(op, args)
    assert_accurate(actual, expected_results(op, case), str(case))


def test_the_kernels_are_those_of_amx():
    """Or the test above would judge another instruction set's."""
    with emulation.use_isa_anyhow(emulation.AMX):
        assert cpu.isa() == emulation.AMX
