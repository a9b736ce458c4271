"""The yardsticks of a GPU: calls that do nothing but read or copy so many bytes, and the rates of
large ones and of large products.

torch has several kernels that would do, and which of them is fastest depends on the size and the
GPU: each is tried, and the fastest is the yardstick. Nothing of what is read or copied is in the L2
cache where `llama_fast.bench.timing` times the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .timing import interleaved_on_gpu

BYTES = 2**30  # some hundred microseconds, of which starting and ending are no part
ROW = 2**12  # float32 numbers that have a sum of their own
ROUNDS = 10
PRODUCT = 8192  # rows and columns, large enough for any GPU to reach its best

Calls = dict[str, Callable[[], object]]


def plain_read(nbytes: int, device: str | torch.device) -> Callable[[], object]:
    """A call that reads as many bytes, to a row of ROW numbers, and writes next to nothing."""
    return fastest(reads(nbytes, device), device)


def plain_copy(nbytes: int, device: str | torch.device) -> Callable[[], object]:
    """A call that reads half as many bytes and writes the other half."""
    return fastest(copies(nbytes, device), device)


def read_bandwidth(device: str | torch.device) -> float:
    """Bytes a second of a large read."""
    return BYTES / _shortest(reads(BYTES, device), device)


def copy_bandwidth(device: str | torch.device) -> float:
    """Bytes a second of a large copy, both directions counted."""
    return BYTES / _shortest(copies(BYTES, device), device)


def product_rate(device: str | torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices, in float32 as torch has been told to round it."""
    n = PRODUCT
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _shortest({"mm": lambda: torch.mm(x, y)}, device)


def reads(nbytes: int, device: str | torch.device) -> Calls:
    """Sums of float32 numbers: of each row, and of all together. Of more than BYTES, these are read
    again and again."""
    pieces = list(_pieces(max(1, nbytes // (4 * ROW)), BYTES // (4 * ROW)))
    numbers = torch.ones(pieces[0], ROW, dtype=torch.float32, device=device)
    sums = torch.empty(pieces[0], dtype=torch.float32, device=device)
    total = torch.empty((), dtype=torch.float32, device=device)
    rows = [(numbers[:n], sums[:n]) for n in pieces]
    flat = [x.view(-1) for x, _ in rows]

    def sum_rows() -> None:
        for x, y in rows:
            torch.sum(x, 1, out=y)

    def sum_all() -> None:
        for x in flat:
            torch.sum(x, 0, out=total)

    return {"rows": sum_rows, "all": sum_all}


def copies(nbytes: int, device: str | torch.device) -> Calls:
    """torch's copy, which is the driver's, and an element-wise kernel that changes nothing."""
    pieces = list(_pieces(max(1, nbytes // 8), BYTES // 8))  # float32 numbers, read and written
    source = torch.ones(pieces[0], dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    both: list[tuple[Tensor, Tensor]] = [(source[:n], target[:n]) for n in pieces]

    def copy() -> None:
        for x, y in both:
            y.copy_(x)

    def absolute() -> None:
        for x, y in both:
            torch.abs(x, out=y)

    return {"copy": copy, "element-wise": absolute}


def _pieces(count: int, most: int) -> Iterator[int]:
    """The numbers, at most `most` each, that add up to `count`, the largest first."""
    for start in range(0, count, most):
        yield min(most, count - start)


def fastest(calls: Calls, device: str | torch.device) -> Callable[[], object]:
    """The call that takes the device the least time."""
    seconds = _seconds(calls, device)
    return calls[min(calls, key=lambda name: min(seconds[name]))]


def _shortest(calls: Calls, device: str | torch.device) -> float:
    return min(map(min, _seconds(calls, device).values()))


def _seconds(calls: Calls, device: str | torch.device) -> dict[str, list[float]]:
    with torch.cuda.device(device):
        return interleaved_on_gpu(calls, ROUNDS).seconds
