"""Runs the CUDA kernels on the ops' cases under AddressSanitizer and UBSan; tests/test_cuda.py
starts this in a process into which their libraries are loaded. A finding ends the process.

With `--all` in every dtype; otherwise as selection.py says. Inputs lie at the ends of allocations
of their own, so that an access beyond them is one of memory that nobody has.
"""

from __future__ import annotations

import functools
import sys

import torch

from llama_fast.backends import cuda
from llama_fast.dispatch import OPS, use_backend

from ..ops.oracle import as_tuple, assert_accurate, of_op
from ..selection import EVERY, full_dtype
from . import host


def exact_copy(x: torch.Tensor) -> torch.Tensor:
    """`x`, strides kept, in an allocation that ends with its last element."""
    if not x.numel():
        return x.clone()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.empty(span, dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x)


expected = functools.lru_cache(maxsize=1)(of_op)  # of the case that is run twice


def run(op, args: tuple, name: str) -> bool:
    """Whether the op's kernel took these arguments; its results are judged as everywhere."""
    own = tuple(exact_copy(a) if isinstance(a, torch.Tensor) else a for a in args)
    if op.explain(*own).reasons["cuda"]:
        return False
    with torch.no_grad():
        actual = as_tuple(op(*own))
    assert_accurate(actual, expected(op, args)[: len(actual)], name)
    return True


def backward_arguments(op, args: tuple) -> tuple[str, tuple] | None:
    """The backward op of `op` that has a kernel, and arguments for it."""
    if op.name in ("rms_norm", "swiglu"):
        grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
        return f"{op.name}_backward", (grad.to(args[0].dtype), *args)
    if op.name == "add_rms_norm":
        grads = torch.randn(2, *args[0].shape, generator=torch.Generator().manual_seed(1))
        return "add_rms_norm_backward", (*grads.to(args[0].dtype), args[0], *args[2:])
    return None


def main() -> None:
    assert host.address_sanitizer_is_loaded(), "start this as tests/test_cuda.py does"
    taken = 0
    with host.use_host(order=1), use_backend("cuda", strict=True):
        for name, op in OPS.items():
            for number, case in enumerate(op.cases() if op.cases else []):
                for at, dtype in enumerate(case.dtypes):
                    in_full = dtype is full_dtype("cuda", case.dtypes) or "--all" in sys.argv
                    if not in_full and (number + at) % EVERY:
                        continue
                    args = case.make(torch.Generator().manual_seed(0), dtype, "cpu")
                    taken += run(op, args, f"{name} {case} {dtype}")
                    if "attention_prefill" in (x.kernel for x in host.take_launches()):
                        cuda.WARPGROUPS = True
                        taken += run(op, args, f"{name} {case} {dtype}, warpgroups")
                        cuda.WARPGROUPS = False
                    if backward := backward_arguments(op, args):
                        taken += run(OPS[backward[0]], backward[1], f"{backward[0]} {case}")
    print(f"{taken} cases")


if __name__ == "__main__":
    sys.exit(main())
