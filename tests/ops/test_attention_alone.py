"""What a query gets on the CPU kernels is what it gets alone, bit for bit: whatever queries, rows
of a batch, documents or threads it is computed with, and however a prefill is cut into chunks."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from llama_fast import batch_invariant
from llama_fast.dispatch import OPS
from llama_fast.ops import quantized_kv

from .backends import EMULATED, PRODUCTS, name_of
from .backends import on as on_backend

ISAS = [backend for backend in PRODUCTS if name_of(backend).startswith("cpu-")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K = 2
# G, D and keys; the first ones for instruction sets that take their time.
SMALL = [(4, 64, 130), (3, 96, 1025), (3, 24, 70)]
SHAPES = [
    *SMALL,
    (1, 64, 1),
    (1, 128, 2500),
    (3, 8, 17),
    (2, 80, 200),
    (4, 128, 1023),
    (4, 128, 2500),
    (8, 96, 130),
    (8, 64, 2500),
]
pytestmark = pytest.mark.skipif(not ISAS, reason="this needs llama_fast._cpu")


def on(backend: str) -> ExitStack:
    """As the other tests'; where tile registers multiply bfloat16, as `batch_invariant` has it."""
    stack = on_backend(backend)
    if backend.startswith("cpu-amx"):
        stack.enter_context(batch_invariant())
    return stack


class Cache(NamedTuple):
    """Keys and values (B, S, K, D), and their scales where they are int8."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    def at(self, *index: slice) -> Cache:
        return Cache(*(None if x is None else x[index] for x in self))


class Result(NamedTuple):
    o: torch.Tensor  # (B, T, H, D)
    lse: torch.Tensor  # (B, H, T)

    def query(self, b: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.o[b, t], self.lse[b, :, t]


def problem(B, T, S, G, D, dtype, int8: bool) -> tuple[torch.Tensor, Cache]:
    generator = torch.Generator().manual_seed(S + G)
    q = torch.randn(B, T, K * G, D, generator=generator).to(dtype)
    k, v = (torch.randn(B, S, K, D, generator=generator) for _ in range(2))
    if not int8:
        return q, Cache(k.to(dtype), v.to(dtype), None, None)
    (k, k_scale), (v, v_scale) = quantized_kv.quantize(k), quantized_kv.quantize(v)
    return q, Cache(k, v, k_scale, v_scale)


def attention(q, cache: Cache, causal=True, lengths=None, cu_seqlens=None) -> Result:
    lengths, cu_seqlens = (
        None if x is None else torch.tensor(x, dtype=torch.int32) for x in (lengths, cu_seqlens)
    )
    lengths = None if lengths is None else lengths.long()
    scales = cache.k_scale, cache.v_scale
    return Result(
        *OPS["attention"](q, cache.k, cache.v, causal, None, lengths, True, *scales, cu_seqlens)
    )


def of_queries(q: torch.Tensor, cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each query of the only row against the keys that it sees, which are all there is."""
    T, S = q.shape[1], cache.k.shape[1]
    every = slice(None)
    return [
        attention(q[:, t : t + 1], cache.at(every, slice(S - T + t + 1))).query(0, 0)
        for t in range(T)
    ]


def assert_alike(found, expected, what: str) -> None:
    for name, x, y in zip(Result._fields, found, expected, strict=True):
        assert torch.equal(x, y), f"{name} of {what}"


def shapes_of(backend: str) -> list[tuple[int, int, int]]:
    return SMALL if backend.endswith((EMULATED, "scalar")) else SHAPES


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ISAS)
def test_a_step_of_many_queries(backend, dtype, int8):
    for G, D, S in shapes_of(backend):
        T = min(S, 64)
        q, cache = problem(1, T, S, G, D, dtype, int8)
        with on(backend):
            alone = of_queries(q, cache)
            for size in (2, 3, 5, 16, 17, 64):
                for begin in range(0, T, size):
                    end = min(begin + size, T)
                    seen = cache.at(slice(None), slice(S - T + end))
                    step = attention(q[:, begin:end], seen)
                    for t in range(begin, end):
                        what = f"query {t} in a step of {end - begin}, {(G, D, S)}"
                        assert_alike(step.query(0, t - begin), alone[t], what)


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ISAS)
def test_a_prefill_in_chunks(backend, dtype, int8):
    S, G, D = 1300, 2, 64
    tokens = 40 if backend.endswith((EMULATED, "scalar")) else S
    q, cache = problem(1, tokens, S, G, D, dtype, int8)
    every = slice(None)
    with on(backend):
        whole = attention(q, cache)
        for size in (1, 7, 33, 500):
            # The last ones, of which all sizes have enough.
            for begin in range(max(0, tokens - 6 * size), tokens, size):
                end = min(begin + size, tokens)
                chunk = attention(q[:, begin:end], cache.at(every, slice(S - tokens + end)))
                what = f"tokens {begin} to {end}"
                expected = Result(whole.o[:, begin:end], whole.lse[:, :, begin:end])
                assert_alike(chunk, expected, what)


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ISAS)
def test_a_batch_and_any_number_of_threads(backend, dtype, int8, threads):
    S, G, D = 2100, 4, 64
    lengths = [2100, 3, 1024, 1300]
    for T in (1, 4, 21):
        q, cache = problem(len(lengths), T, S, G, D, dtype, int8)
        for causal in (True, False):
            with on(backend):
                threads(1)
                together = attention(q, cache, causal, lengths)
                threads(2)
                assert_alike(attention(q, cache, causal, lengths), together, "two threads")
                for b, length in enumerate(lengths):
                    row, queries = slice(b, b + 1), min(T, length) if causal else T
                    alone = attention(q[row, T - queries :], cache.at(row, slice(length)), causal)
                    for t in range(queries):
                        what = f"query {t} of row {b}, causal: {causal}"
                        expected = alone.query(0, t)
                        assert_alike(together.query(b, T - queries + t), expected, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ISAS)
def test_documents(backend, dtype):
    bounds = [0, 1, 18, 18, 148, 340 if backend.endswith(EMULATED) else 1200]
    q, cache = problem(1, bounds[-1], bounds[-1], 4, 64, dtype, False)
    with on(backend):
        packed = attention(q, cache, cu_seqlens=bounds)
        for begin, end in pairwise(bounds):
            if begin == end:
                continue
            its = slice(begin, end)
            alone = attention(q[:, its], cache.at(slice(None), its))
            expected = Result(packed.o[:, its], packed.lse[:, :, its])
            assert_alike(alone, expected, f"document {begin} to {end}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ISAS)
def test_what_a_query_does_not_see_does_not_reach_it(backend, dtype, int8, T, bad):
    """Not even where the query beside it, or the other key of a pair, has it."""
    S = 140
    q, cache = problem(1, T, S, 3, 64, dtype, int8)
    with on(backend):
        expected = attention(q, cache)
        for t in range(T - 1):
            k, v, k_scale, v_scale = (None if x is None else x.clone() for x in cache)
            hidden = slice(S - T + t + 1, None)  # from query t
            for x in (k_scale, v_scale) if int8 else (k, v):
                x[:, hidden] = bad
            found = attention(q, Cache(k, v, k_scale, v_scale))
            for seen in range(t + 1):
                assert_alike(found.query(0, seen), expected.query(0, seen), f"query {seen} of {t}")
            assert not found.o[0, t + 1 :].isfinite().any()
