"""A GPU's yardsticks, on the CPU: they move what was asked for, and take turns with the call."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast.ops  # noqa: F401  declares the ops
from llama_fast.bench import measure, roofline, roofline_gpu
from llama_fast.bench.results import COPY, READ, Row
from llama_fast.bench.roofline_gpu import ROW
from llama_fast.bench.timing import DeviceTimes, interleaved

MIB = 2**20


class Moved(TorchDispatchMode):
    """The bytes that calls read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*zip(function._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs]
        for argument, x in given:
            if isinstance(x, torch.Tensor) and not function.is_view:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written += x.nbytes
                else:
                    self.read += x.nbytes
        return function(*args, **kwargs)


@pytest.mark.parametrize("nbytes", [4 * ROW, 3 * MIB + 4, 10 * MIB])
@pytest.mark.parametrize("make", [roofline_gpu.reads, roofline_gpu.copies])
def test_they_move_as_many_bytes_and_not_more(make, nbytes, monkeypatch):
    monkeypatch.setattr(roofline_gpu, "BYTES", 4 * MIB)  # of more, it is read again
    for call in make(nbytes, "cpu").values():
        with Moved() as moved:
            call()
        whole = nbytes // (4 * ROW) * 4 * ROW if make is roofline_gpu.reads else nbytes // 8 * 8
        if make is roofline_gpu.reads:
            assert moved.read == whole and moved.written <= max(4, whole // ROW)
        else:
            assert moved.read == moved.written == whole // 2


def device_times(calls, rounds, *, warm=False):
    """Stands for a GPU's clock."""
    seconds = {name: [1e-3] * rounds for name in calls} | {
        name: [2e-3, 1e-4, 2e-3][:rounds] for name in calls if name == "rows"
    }
    return DeviceTimes(seconds, {name: [1e-6] * rounds for name in calls})


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(roofline_gpu, "interleaved_on_gpu", device_times)
    monkeypatch.setattr(roofline_gpu, "ROUNDS", 3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())


def test_the_fastest_of_them_is_the_yardstick(clock):
    assert roofline_gpu.plain_read(MIB, "cpu").__name__ == "sum_rows"
    assert roofline_gpu.plain_copy(MIB, "cpu").__name__ == "copy"


def test_a_gpu_s_read_is_a_read(clock, monkeypatch):
    monkeypatch.setattr(roofline_gpu, "BYTES", MIB)
    made = []

    def noted(name):
        real = getattr(roofline_gpu, name)
        monkeypatch.setattr(roofline_gpu, name, lambda n, d: made.append(name) or real(n, "cpu"))

    noted("reads"), noted("copies")
    roofline.forget()
    try:
        assert roofline.read_bandwidth("cuda") == MIB / 1e-4 and made == ["reads"]
        assert roofline.copy_bandwidth("cuda") == MIB / 1e-3 and made == ["reads", "copies"]
    finally:
        roofline.forget()


@pytest.mark.parametrize(("bound", "name"), [("copy", COPY), ("read", READ)])
def test_a_call_is_timed_in_turn_with_what_moves_as_many_bytes(bound, name, monkeypatch):
    """A peak rate of a large copy would say that the memory allows less than that."""
    asked = []

    def yardstick(nbytes, device):
        asked.append(nbytes)
        return lambda: None

    def on_gpu(calls, rounds, *, warm):
        return DeviceTimes(interleaved(calls, rounds), {who: [1e-6] for who in calls})

    monkeypatch.setitem(measure.YARDSTICKS_ON_GPU, bound, (name, yardstick))
    monkeypatch.setattr(measure, "interleaved_on_gpu", on_gpu)
    monkeypatch.setattr(measure, "_rounds_on_gpu", lambda calls, rounds, device: rounds)
    row = Row("x", "x", "GB/s", 1.0, bytes=12345, bound=bound, at_best=1.0)
    calls = {"cuda": lambda: None}
    measure._time_on_gpu(row, calls, 3, False, torch.device("cuda"))
    assert asked == [12345] and row.samples.keys() == {"cuda", name} and row.own() == "cuda"
    assert row.at_best == row.seconds(name) and row.host.keys() == {"cuda"}
    row.at_best = 1.0
    measure._time_on_gpu(row, calls, 3, True, torch.device("cuda"))  # what is in a cache
    assert row.samples.keys() == {"cuda"} and row.at_best == 1.0
    row.bound = "bfloat16"
    measure._time_on_gpu(row, calls, 3, False, torch.device("cuda"))
    assert row.samples.keys() == {"cuda"}
