"""What this machine can do at most, measured: the yardstick of every kernel's speed.

Each is measured once a process, in about 0.2 s, as the best of repetitions after a warm-up, with
torch's number of threads: other programs can only make a peak rate look lower than it is. What must
be compared with a peak rate closely takes turns with it: `plain_read` and `multiply_adds` are that
work as calls. Those of a GPU are in `llama_fast.bench.roofline_gpu`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import roofline_gpu

try:
    from .. import _cpu
except ImportError:
    _cpu = None

BYTES = 256 * 2**20  # several times the last cache of most machines
LINE = 64  # bytes that are read at a time
REPEATS = 5
SECONDS = 0.2


@dataclass(frozen=True)
class Roofline:
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


def measure(device: str = "cpu") -> Roofline:
    """All of them; about a second."""
    on_cpu = torch.device(device).type == "cpu"

    def rate(dtype: torch.dtype) -> float | None:
        if on_cpu:
            return multiply_add_rate(pairs=dtype is torch.bfloat16)
        return _of_gpu(roofline_gpu.product_rate, torch.device(device), dtype)

    return Roofline(
        device=device,
        threads=torch.get_num_threads() if on_cpu else 0,
        isa=_cpu.isa() if on_cpu and _cpu is not None else None,
        read=read_bandwidth(device),
        copy=copy_bandwidth(device),
        float32=rate(torch.float32),
        bfloat16=rate(torch.bfloat16),
    )


def read_bandwidth(device: str | torch.device = "cpu") -> float | None:
    """Bytes a second that all threads together, or a GPU, read from memory. None on a CPU where the
    C++ kernels are not built."""
    if torch.device(device).type == "cuda":
        return _of_gpu(roofline_gpu.read_bandwidth, torch.device(device))
    return None if _cpu is None else _cpu_read(torch.get_num_threads(), _cpu.isa())


def copy_bandwidth(device: str | torch.device = "cpu") -> float | None:
    """Bytes a second that a copy reads and writes, both counted. None as `read_bandwidth`."""
    if torch.device(device).type == "cuda":
        return _of_gpu(roofline_gpu.copy_bandwidth, torch.device(device))
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
def _of_gpu(what: Callable[..., float], *args: object) -> float:
    return what(*args)


def forget() -> None:
    """Lets the next calls measure anew: on a machine that others use too, peak rates change."""
    for measured in (_cpu_read, _cpu_copy, _cpu_multiply_add, _of_gpu):
        measured.cache_clear()


def _sink(threads: int) -> torch.Tensor:
    """Where the loops leave their results, whatever torch's default dtype and device are."""
    return torch.zeros(threads, dtype=torch.float32, device="cpu")


def _memory(nbytes: int) -> torch.Tensor:
    """Memory that was written, because pages never written all read one page of zeros; in huge
    pages, as weights are. torch aligns what it allocates to 64 bytes."""
    fresh = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
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
