"""The loops that measure the machine do all that they are credited with."""

from __future__ import annotations

import pytest
import torch

from llama_fast.backends import cpu
from llama_fast.bench import roofline

_cpu = pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")
LINE = 64


@pytest.fixture(params=_cpu.isas())
def isa(request):
    with cpu.use_isa(request.param):
        yield request.param


@pytest.mark.parametrize("threads", [1, 2])
def test_read_meets_every_line(isa, threads):
    numbers = torch.randint(2**20, (64, LINE // 8))
    sink = torch.full((threads,), torch.nan)
    _cpu.read_memory(numbers.data_ptr(), numbers.nbytes, threads, sink.data_ptr())
    for part, found in zip(numbers[:, 0].chunk(threads), sink.tolist(), strict=True):
        expected = 0
        for number in part.tolist():
            expected ^= number
        assert found == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_copy_copies_every_byte(isa, threads):
    source = torch.randint(256, (100 * LINE,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    _cpu.copy_memory(source.data_ptr(), target.data_ptr(), source.numel(), threads)
    assert torch.equal(source, target)


def test_multiply_add_counts_its_work(isa):
    lanes = {"scalar": 1, "avx2": 8, "avx_vnni": 8}.get(isa, 16)
    sink = torch.full((2,), torch.nan)
    assert _cpu.multiply_add(False, 10, 2, sink.data_ptr()) == 10 * 2 * 12 * lanes * 2
    expected = 0.0
    for x in range(12):
        for _ in range(10):
            x = x * 0.999 + 0.1
        expected += x
    assert sink.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    step = {"amx": 4 * 16 * 16 * 32, "avx512_bf16": 12 * lanes * 2}.get(isa, 12 * lanes)
    assert _cpu.multiply_add(True, 10, 2, sink.data_ptr()) == 10 * 2 * step * 2


class Counter:
    """Stands for the C++ kernels: what they were asked for."""

    def __init__(self):
        self.read, self.steps = [], []

    def read_memory(self, source, nbytes, threads, sink):
        self.read.append((source, nbytes))

    def prefer_huge_pages(self, address, nbytes):
        pass

    def multiply_add(self, pairs, steps, threads, sink):
        self.steps.append(steps)
        return steps * threads * (48 if pairs else 24)


def test_a_plain_read_goes_on_where_the_last_one_ended(monkeypatch):
    kernels = Counter()
    monkeypatch.setattr(roofline, "_cpu", kernels)
    monkeypatch.setattr(roofline, "BYTES", 4096)
    read = roofline.plain_read(5000)  # 79 lines
    read()
    read()
    first = kernels.read[0][0]
    assert [(source - first, nbytes) for source, nbytes in kernels.read] == [
        *((0, 4096), (0, 960)),
        *((960, 3136), (0, 1920)),
    ]


def test_multiply_adds_are_as_many_as_asked_for(monkeypatch):
    kernels = Counter()
    monkeypatch.setattr(roofline, "_cpu", kernels)
    flops = 48 * torch.get_num_threads() * 12345
    roofline.multiply_adds(flops, True)()
    roofline.multiply_adds(flops, False)()
    assert kernels.steps[1::2] == [12345, 2 * 12345]


def test_measure_gives_rates_that_a_machine_can_have(monkeypatch):
    monkeypatch.setattr(roofline, "BYTES", 2**24)
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    roofline.forget()
    try:
        found = roofline.measure("cpu")
    finally:  # the real peak rates are those of larger memory
        roofline.forget()
    assert found.threads == torch.get_num_threads() and found.isa == _cpu.isa()
    for rate in (found.read, found.copy, found.float32, found.bfloat16):
        assert 1e7 < rate < 1e14
    assert roofline.read_bandwidth("cpu") != found.read


def test_a_peak_is_measured_once():
    assert roofline.read_bandwidth("cpu") == roofline.read_bandwidth("cpu")
