"""AMX differs from AVX512_BF16 in its products of matrices alone, so it is tested on these; the tests
of linear have it among their backends too. On a CPU with AMX the kernels run themselves, elsewhere
emulated."""

from __future__ import annotations

import pytest
import torch

from llama_fast.backends import cpu
from llama_fast.dispatch import OPS, use_backend

from ..ops.oracle import assert_accurate, of_op, run_poisoned
from . import emulation

pytestmark = pytest.mark.skipif(
    bool(emulation.why_no_x86_compiler()), reason=emulation.why_no_x86_compiler() or "it runs"
)

OP = OPS["linear"]
CASES = [case for case in OP.cases() if torch.bfloat16 in case.dtypes]


def use_isa(isa: str):
    return (cpu.use_isa if isa in cpu.isas() else emulation.use_isa)(isa)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case):
    args = case.make(torch.Generator().manual_seed(0), torch.bfloat16, "cpu")
    with use_isa(emulation.AMX), use_backend("cpu", strict=True):
        actual = run_poisoned(OP, args)
    assert_accurate(actual, of_op(OP, args), str(case))


def test_the_kernels_are_those_of_amx():
    """Or the test above would judge another instruction set's."""
    with use_isa(emulation.AMX):
        assert cpu.isa() == emulation.AMX
