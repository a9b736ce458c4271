"""AVX-VNNI differs from AVX2 in its products of bytes and of words, whose sums are exact: the two
give the same bits. On a CPU with AVX-VNNI its kernels run themselves, elsewhere emulated."""

from __future__ import annotations

import pytest
import torch

from llama_fast.backends import cpu
from llama_fast.dispatch import OPS, use_backend

from ..ops.oracle import as_tuple, run_poisoned
from . import emulation

pytestmark = pytest.mark.skipif(
    bool(emulation.why_no_x86_compiler()), reason=emulation.why_no_x86_compiler() or "it runs"
)
HERE = emulation.AVX_VNNI in cpu.isas()
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


def results(isa: str, op, args: tuple) -> tuple[torch.Tensor, ...]:
    use_isa = cpu.use_isa if isa in cpu.isas() else emulation.use_isa
    with use_isa(isa), use_backend("cpu", strict=True):
        return as_tuple(run_poisoned(op, args))


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_the_bits_of_avx2(op, case, dtype):
    args = arguments(case, dtype)
    found, wanted = results(emulation.AVX_VNNI, op, args), results("avx2", op, args)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def test_they_are_other_kernels():
    """Or the test above would compare AVX2's with themselves."""
    with (cpu.use_isa if HERE else emulation.use_isa)(emulation.AVX_VNNI):
        assert cpu.isa() == emulation.AVX_VNNI
