"""What a result of attention depends on, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast import attention, use_backend
from llama_fast.backends import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(B, T, S, H, K, D, dtype):
    made = torch.Generator().manual_seed(0)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("T", [1, 3, 21])
def test_a_row_depends_on_its_own_keys_alone(isa, dtype, T):
    """Neither on the rows beside it, of one part of the keys or of several, or of many queries, nor
    on what lies behind its length, nor on the number of threads."""
    S, lengths = 2200, [1, 2113, 3, 0, 1040, 2200]
    q, k, v = inputs(len(lengths), T, S, 8, 2, 64, dtype)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = math.nan
    before = torch.get_num_threads()
    try:
        with cpu.use_isa(isa), use_backend("cpu", strict=True):
            torch.set_num_threads(1)
            together = attention(q, k, v, lengths=torch.tensor(lengths))
            assert together.isfinite().all()
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                found = attention(q, k, v, lengths=torch.tensor(lengths))
                assert torch.equal(found, together), f"{threads} threads"
            for b, length in enumerate(lengths):
                one, queries = slice(b, b + 1), min(T, length)
                alone = attention(q[one, T - queries :], k[one, :length], v[one, :length])
                assert torch.equal(together[one, T - queries :], alone), length
                assert not together[b, : T - queries].any()
    finally:
        torch.set_num_threads(before)
