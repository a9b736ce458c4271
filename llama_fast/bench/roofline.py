"""What this machine can do at most, measured: the yardstick of every kernel's speed.

Each is measured once a process, in about 0.2 s, as the best of repetitions after a warm-up, with
torch's number of threads: other programs can only make a ceiling look lower than it is. What must
be compared with a ceiling closely takes turns with it: `plain_read` and `multiply_adds` are that
work as calls.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

try:
    from .. import _cpu
except ImportError:
    _cpu = None

BYTES = 256 * 2**20  # several times the last cache of most machines
LINE = 64  # bytes that are read at a time
BYTES_ON_GPU = 2**30  # some hundred microseconds, of which starting and ending are no part
REPEATS = 5
SECONDS = 0.2
PRODUCT = 8192  # rows and columns, large enough for any GPU to reach its best


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a plain read and of a copy (both directions counted), FLOP/s of float32
    multiply-adds and of the fastest bf16 instruction, on a GPU those of torch's largest products;
    None where that cannot be measured."""

    device: str
    threads: int
    isa: str | None
    read: float | None
    copy: float | None
    float32: float | None
    bfloat16: float | None


def measure(device: str = "cpu") -> Ceilings:
    """All of them; about a second."""
    on_cpu = torch.device(device).type == "cpu"
    return Ceilings(
        device=device,
        threads=torch.get_num_threads() if on_cpu else 0,
        isa=_cpu.isa() if on_cpu and _cpu is not None else None,
        read=read_bandwidth(device),
        copy=copy_bandwidth(device),
        float32=multiply_add_rate(pairs=False) if on_cpu else _cuda_product(device, torch.float32),
        bfloat16=multiply_add_rate(pairs=True) if on_cpu else _cuda_product(device, torch.bfloat16),
    )


def read_bandwidth(device: str | torch.device = "cpu") -> float | None:
    """Bytes a second that all threads together read from memory; on a GPU, that a copy moves.

    None where the C++ kernels are not built.
    """
    if torch.device(device).type == "cuda":
        return _cuda_copy(torch.device(device))
    return None if _cpu is None else _cpu_read(torch.get_num_threads(), _cpu.isa())


def copy_bandwidth(device: str | torch.device = "cpu") -> float | None:
    """Bytes a second that a copy reads and writes, both counted. None as `read_bandwidth`."""
    if torch.device(device).type == "cuda":
        return _cuda_copy(torch.device(device))
    return None if _cpu is None else _cpu_copy(torch.get_num_threads(), _cpu.isa())


def multiply_add_rate(*, pairs: bool) -> float | None:
    """FLOP/s of the CPU's multiply-adds in registers: float32, or with `pairs` those of bf16 pairs
    where the instruction set in use has them. A multiply-add counts as two."""
    return None if _cpu is None else _cpu_multiply_add(pairs, torch.get_num_threads(), _cpu.isa())


def plain_read(nbytes: int) -> Callable[[], None]:
    """A call that reads as many bytes from memory, with torch's number of threads. It goes on where
    the last one ended, so that a few bytes come from memory, too. Needs the C++ kernels."""
    threads, whole = torch.get_num_threads(), -(-nbytes // LINE) * LINE
    source, sink = _memory(BYTES), _sink(threads)
    at = 0

    def read() -> None:
        nonlocal at
        left = whole
        while left > 0:
            piece = min(left, BYTES - at)
            _cpu.read_memory(source.data_ptr() + at, piece, threads, sink.data_ptr())
            left -= piece
            at = (at + piece) % BYTES

    return read


def multiply_adds(flops: int, pairs: bool) -> Callable[[], None]:
    """A call of as many FLOPs, as `multiply_add_rate` counts them. Needs the C++ kernels."""
    threads, trial = torch.get_num_threads(), 1000
    sink = _sink(threads)
    per_step = _cpu.multiply_add(pairs, trial, threads, sink.data_ptr()) / trial
    steps = max(1, round(flops / per_step))
    return lambda: _cpu.multiply_add(pairs, steps, threads, sink.data_ptr())


# The instruction set is an argument of these for their results to be kept apart.


@functools.cache
def _cpu_read(threads: int, isa: str) -> float:
    read = plain_read(BYTES)
    return BYTES / _shortest(lambda: _host_seconds(read))


@functools.cache
def _cpu_copy(threads: int, isa: str) -> float:
    half = BYTES // 2
    source, target = _memory(half), _memory(half)
    return BYTES / _shortest(
        lambda: _host_seconds(_cpu.copy_memory, source.data_ptr(), target.data_ptr(), half, threads)
    )


@functools.cache
def _cpu_multiply_add(pairs: bool, threads: int, isa: str) -> float:
    sink, steps = _sink(threads), 1000
    flops, seconds = 0, 0.0
    while seconds < SECONDS / REPEATS:  # as many steps as fill the time
        steps *= 4
        start = time.perf_counter()
        flops = _cpu.multiply_add(pairs, steps, threads, sink.data_ptr())
        seconds = time.perf_counter() - start
    return flops / _shortest(
        lambda: _host_seconds(_cpu.multiply_add, pairs, steps, threads, sink.data_ptr())
    )


@functools.cache
def _cuda_copy(device: torch.device) -> float:
    source = torch.ones(BYTES_ON_GPU, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * BYTES_ON_GPU / _shortest(lambda: _cuda_seconds(device, target.copy_, source))


@functools.cache
def _cuda_product(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices, in float32 as torch has been told to round it."""
    n = PRODUCT
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _shortest(lambda: _cuda_seconds(device, torch.mm, x, y))


def _cuda_seconds(device: str | torch.device, call: Callable[..., object], *args: object) -> float:
    """Of a call on the device, by its own clock."""
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call(*args)
        after.record()
        torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def forget() -> None:
    """Lets the next calls measure anew: on a machine that others use too, ceilings change."""
    for measured in (_cpu_read, _cpu_copy, _cpu_multiply_add, _cuda_copy, _cuda_product):
        measured.cache_clear()


def _sink(threads: int) -> torch.Tensor:
    """Where the loops leave their results, whatever torch's default dtype is."""
    return torch.zeros(threads, dtype=torch.float32)


def _memory(nbytes: int) -> torch.Tensor:
    """Memory that was written, because pages never written all read one page of zeros; in huge
    pages, as weights are. torch aligns what it allocates to 64 bytes."""
    fresh = torch.empty(nbytes, dtype=torch.uint8)
    _cpu.prefer_huge_pages(fresh.data_ptr(), nbytes)
    return fresh.fill_(1)


def _shortest(seconds: Callable[[], float]) -> float:
    seconds()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        times.append(seconds())
    return min(times)


def _host_seconds(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start
