"""Which tests run unless `--all` asks for all of them.

Tests in several dtypes on several backends are the bulk of the work. On each backend one dtype runs
in full, and of the others every third combination, so spread that each case meets each dtype, and
each backend as well. Cases that differ from others in size alone run in the one dtype. What is
marked `thorough` is left out, and what takes very long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch

EVERY = 3
# The parts of the rows and of the vocabulary are the same in every dtype, and large.
IN_ONE_DTYPE = ("linear_cross_entropy-two blocks",)
# Each takes Triton's interpreter 2 to 30 seconds; shorter cases meet the same kernels.
SLOW = (
    "test_forward[attention-long-float32-triton]",
    "test_forward[attention-8 bits, long-float32-triton]",
    "test_gradient[attention-long-float32-triton]",
    "test_gradient[attention-long-bfloat16-triton]",
    "test_gradient[attention-long decode-float32-triton]",
    "test_gradient[attention-1b heads-float32-triton]",
    "test_gradient[attention-1b heads-bfloat16-triton]",
    "test_gradient[attention-8b decode-float32-triton]",
    "test_gradient[attention-few queries, long-float32-triton]",
    "test_gradient[attention-few queries, long-bfloat16-triton]",
    "test_gradient[linear_cross_entropy-two blocks-float32-triton]",
    "test_gradient[linear-swiglu, decode, 4 bits-float32-triton]",
    "test_gradient[linear-swiglu, decode, 8 bits-float32-triton]",
    "test_gradient[linear-quantised, decode, 4 bits-float32-triton]",
)


def runs_all(config: pytest.Config) -> bool:
    """Whether nothing that is asked for is left out."""
    return config.getoption("--all") or any("::" in argument for argument in config.args)


def short_run(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of `items` that run without `--all`, in their order."""
    items = [
        item for item in items if not item.get_closest_marker("thorough") and item.name not in SLOW
    ]
    dtypes = defaultdict(dict)  # of each test, in the order of collection, as are the others
    for item in filter(_of_both, items):
        dtypes[item.function].setdefault(item.callspec.params["dtype"])
    cases, backends = defaultdict(dict), defaultdict(dict)
    return [item for item in items if not _of_both(item) or _runs(item, dtypes, cases, backends)]


def full_dtype(backend: str, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that a test runs in full: the one that most kernels of the backend take."""
    half = backend.startswith(("cuda", "cpu-avx512_bf16", "cpu-amx"))
    preferred = torch.bfloat16 if half else torch.float32
    return preferred if preferred in dtypes else dtypes[0]


def _of_both(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return "backend" in params and "dtype" in params


def _runs(item: pytest.Item, dtypes: dict, cases: dict, backends: dict) -> bool:
    test, params = item.function, item.callspec.params
    backend, dtype = params["backend"], params["dtype"]
    known = list(dtypes[test])
    if dtype is full_dtype(backend, known):
        return True
    if any(f"[{case}-" in item.name for case in IN_ONE_DTYPE):
        return False
    if item.get_closest_marker("skip"):  # it would stand in the place of one that runs
        return False
    case = tuple(i for name, i in item.callspec.indices.items() if name not in ("backend", "dtype"))
    row = cases[test, dtype].setdefault(case, len(cases[test, dtype]))
    column = backends[test].setdefault(backend, len(backends[test]))
    return (row + column + known.index(dtype)) % EVERY == 0
