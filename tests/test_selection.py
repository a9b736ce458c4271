"""Without `--all` a test loses no backend, no case and no dtype, nor a pair of two of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from llama_fast import ops  # noqa: F401
from llama_fast.dispatch import OPS

from .selection import IN_ONE_DTYPE, SLOW, full_dtype, short_run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["eager", "cpu-avx512_bf16", "cpu-avx2", "cpu-scalar", "triton", "cuda", "cuda-host"]
CASES = range(7)
SKIPPED = "cuda"


def item(case: int, at: int, backend: str, dtypes: list, marks: tuple = ()) -> SimpleNamespace:
    """What short_run asks of an item; as in test_ops.py, a case and its dtype are one index."""
    indices = {"case": case * len(dtypes) + at, "dtype": case * len(dtypes) + at}
    indices["backend"] = BACKENDS.index(backend)
    params = {"case": case, "dtype": dtypes[at], "backend": backend}
    if backend == SKIPPED:
        marks = (*marks, "skip")
    return SimpleNamespace(
        name=f"item[{case}-{dtypes[at]}-{backend}]",
        function=item,
        callspec=SimpleNamespace(params=params, indices=indices),
        get_closest_marker=lambda name: name if name in marks else None,
    )


@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[1:]])
def test_no_pair_is_lost(dtypes):
    every = [
        item(case, at, backend, dtypes)
        for case in CASES
        for at in range(len(dtypes))
        for backend in BACKENDS
    ]
    kept = short_run(every)
    assert len(kept) < 0.75 * len(every)
    for a, b in itertools.combinations(("case", "dtype", "backend"), 2):
        pairs = {(x.callspec.params[a], x.callspec.params[b]) for x in every}
        found = {(x.callspec.params[a], x.callspec.params[b]) for x in kept}
        assert all(SKIPPED in pair for pair in pairs - found), f"{a} and {b}"
    for x in every:
        params = x.callspec.params
        if params["dtype"] is full_dtype(params["backend"], dtypes):
            assert x in kept


def test_what_is_marked_thorough_is_left_out():
    assert short_run([item(0, 0, "eager", DTYPES, ("thorough",))]) == []
    assert len(short_run([item(0, 0, "eager", DTYPES)])) == 1


def test_what_differs_in_size_alone_runs_in_one_dtype():
    each = [item(0, at, "eager", DTYPES) for at in range(len(DTYPES))]
    for one in each:
        one.name = one.name.replace("[0-", f"[{IN_ONE_DTYPE[0]}-")
    assert short_run(each) == each[:1]


def test_what_takes_very_long_is_left_out():
    slow = SimpleNamespace(name=SLOW[0], get_closest_marker=lambda name: None)
    assert short_run([slow]) == []
    cases = {f"{name}-{case}" for name, op in OPS.items() if op.cases for case in op.cases()}
    names = {
        f"{test}[{case}-{dtype}-triton]"
        for test in ("test_forward", "test_gradient")
        for case in cases
        for dtype in ("float32", "bfloat16")
    }
    assert set(SLOW) <= names and set(IN_ONE_DTYPE) <= cases
