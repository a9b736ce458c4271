"""linear: the bits of a row do not depend on what is computed beside it, inside of
batch_invariant(); and of bfloat16 at all times where tile registers multiply it."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

import llama_fast
from llama_fast import batch_invariant, linear
from llama_fast.backends import cpu
from llama_fast.ops.linear import BACKWARD_X

from .backends import PRODUCTS, name_of, on
from .oracle import same_bits

CPU = [b for b in PRODUCTS if name_of(b).startswith("cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = (2, 5, 16, 17, 28, 29, 33, 64, 65, 130)
MANY = max(ROWS)

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")


def operands(C_in: int, C_out: int, dtype: torch.dtype):
    """Of products that cancel out: what is left is rounding, which tells every order of a sum."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(MANY, C_in // 2, generator=g), torch.randn(C_out, C_in // 2, generator=g)
    x = torch.cat([half[0], half[0].flip(1)], 1)
    return x.to(dtype), torch.cat([half[1], -half[1].flip(1)], 1).to(dtype)


def test_operands_tell_the_order_of_a_sum():
    x, weight = operands(2048, 40, torch.float32)
    assert not same_bits(x @ weight.T, x.flip(1) @ weight.flip(1).T)
    x, weight = (a.double() for a in (x, weight))
    assert (x @ weight.T).abs().max() < 1e-10


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C_in", "C_out"), [(2048, 37), (9000, 20), (98, 130), (2, 3)])
def test_rows_in_any_company(backend, dtype, C_in, C_out):
    x, weight = operands(C_in, C_out, dtype)
    with on(backend), batch_invariant():
        alone = torch.cat([linear(row[None], weight) for row in x])
        for M in ROWS:
            assert same_bits(linear(x[:M], weight), alone[:M]), f"{M} rows"
            assert same_bits(linear(x[MANY - M :], weight), alone[MANY - M :]), f"{M} last rows"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rows_in_any_company(backend, dtype):
    grad, weight = operands(530, 37, dtype)
    weight = weight.T.contiguous()
    with on(backend), batch_invariant():
        alone = torch.cat([BACKWARD_X(row[None], weight) for row in grad])
        for M in ROWS:
            assert same_bits(BACKWARD_X(grad[:M], weight), alone[:M]), f"{M} rows"


@pytest.mark.parametrize("backend", [b for b in CPU if name_of(b).startswith("cpu-amx")])
def test_tile_registers_need_not_be_asked(backend):
    x, weight = operands(2048, 37, torch.bfloat16)
    with on(backend):
        alone = torch.cat([linear(row[None], weight) for row in x])
        for M in ROWS:
            assert same_bits(linear(x[:M], weight), alone[:M]), f"{M} rows"
        with batch_invariant():
            assert same_bits(linear(x, weight), alone)


def product(rows: int) -> str:
    return llama_fast.explain("linear", torch.ones(rows, 8), torch.ones(8, 8)).how


def test_it_ends_with_the_last_block_whatever_ends_it():
    with cpu.use_isa("scalar"):  # whose products of many rows are torch's
        assert "torch's" in product(40)
        with batch_invariant():
            assert "C++" in product(40)
            with pytest.raises(ValueError, match="inner"), batch_invariant():
                raise ValueError("inner")
            assert "C++" in product(40)
            with batch_invariant():
                thread = threading.Thread(target=lambda: seen.append(product(40)))
                seen = []
                thread.start()
                thread.join()
            assert "C++" in seen[0]  # it holds for every thread
        assert "torch's" in product(40)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_ways_to_call_it(mode):
    x, weight = operands(512, 40, torch.float32)
    with batch_invariant(), mode():
        alone = torch.cat([linear(row[None], weight) for row in x])
        assert same_bits(linear(x, weight), alone)
        assert same_bits(linear(x[None].expand(2, -1, -1), weight)[1], alone)
