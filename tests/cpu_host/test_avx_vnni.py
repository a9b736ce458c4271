"""AVX-VNNI differs from AVX2 in its products of bytes and of words alone, so it is tested on these.
On a CPU with AVX-VNNI the kernels run themselves, elsewhere emulated."""

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
BYTES = (torch.int8, torch.uint8)


def arguments(case, dtype: torch.dtype) -> tuple:
    return case.make(torch.Generator().manual_seed(0), dtype, "cpu")


CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{str(dtype)[6:]}")
    for op in (OPS["linear"], OPS["attention"], OPS["kv_append"])
    for case in op.cases()
    for dtype in case.dtypes
    if any(isinstance(x, torch.Tensor) and x.dtype in BYTES for x in arguments(case, dtype))
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_cases_with_bytes(op, case, dtype):
    args = arguments(case, dtype)
    with emulation.use_isa_anyhow(emulation.AVX_VNNI), use_backend("cpu", strict=True):
        actual = run_poisoned(op, args)
    assert_accurate(actual, of_op(op, args), f"{op.name} {case}")


def test_the_kernels_are_those_of_avx_vnni():
    """Or the test above would judge AVX2's."""
    with emulation.use_isa_anyhow(emulation.AVX_VNNI):
        assert cpu.isa() == emulation.AVX_VNNI
