"""Prints what the oracle says in one dtype of kernels, of eager and of how far rounding may go, by
the ways in which it is asked.

`test_oracle.py` runs this with instruction sets, threads and products other than torch would take:

    python -m tests.ops.verdicts float32 blocked
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .oracle import Expected, as_tuple, assert_accurate, copies
from .wrong_kernels import FAULTS, judged_by

BLOCK = 7  # terms that a blocked product adds at a time


class Blocked(TorchDispatchMode):
    """Inside the block, matrix products are plain sums of small ones instead of those of a BLAS."""

    def __torch_dispatch__(
        self, step: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        n = args[0].shape[-1] if step in (aten.mm.default, aten.bmm.default) else 0
        if not n:
            return step(*args, **(kwargs or {}))
        wide = torch.float64 if args[0].dtype is torch.float64 else torch.float32
        a, b = (x.to(wide) for x in args)
        total = 0
        for i in range(0, n, BLOCK):
            total = total + a[..., i : i + BLOCK] @ b[..., i : i + BLOCK, :]
        return total.to(args[0].dtype)


def passes(results: tuple, wanted: list[Expected]) -> bool:
    try:
        assert_accurate(results, wanted, "")
    except AssertionError:
        return False
    return True


def verdicts(dtype: torch.dtype) -> dict[str, dict]:
    """By the names of the faults: what passes, and the errors that rounding may give."""
    found = {}
    for fault in FAULTS:
        if dtype not in fault.dtypes:
            continue
        op, args, wanted = judged_by(fault.kernel, fault.case, dtype)
        given = copies(args)
        with torch.no_grad():
            eager = as_tuple(op.eager(*given))
        found[str(fault)] = {
            "eager": passes(eager, wanted[: len(eager)]),
            "sound": passes(fault.kernel("", *copies(args)), wanted),
            "faulty": passes(fault.kernel(fault.name, *copies(args)), wanted),
            "allowed": [x for of in wanted for x in (of.largest_error, of.rms_error)],
        }
    return found


if __name__ == "__main__":
    dtype, *ways = sys.argv[1:]
    found, own = {}, torch.get_num_threads()
    for way in ways:
        torch.set_num_threads(3 if way == "threads" else own)
        with Blocked() if way == "blocked" else nullcontext():
            found[way] = verdicts(getattr(torch, dtype))
    print(json.dumps(found))
