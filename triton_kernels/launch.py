"""The one way in which kernels are launched, so that launches can be recorded instead.

What is recorded on tensors of the meta device is what would run on a GPU, down to each constant:
that is how every shipped configuration is compiled on machines that have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

# The names of dtypes in Triton's signatures, and in files of configurations.
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs `kernel` on the grid, or nothing when the grid is empty.

    options  the kernel's constexprs by name, num_warps and num_stages
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
    elif all(grid):
        # Contraction of a · b + c is said aloud: its default differs between Triton's versions.
        kernel[grid](*args, **options, enable_fp_fusion=True)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside the block, launches are added to the list that it yields, and nothing runs."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: a block's sides are powers of two."""
    return 1 << max(n - 1, 0).bit_length()
