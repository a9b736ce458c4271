"""The machine that runs CUDA kernels on the host: what it computes, and the faults it finds."""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch

from . import host

pytestmark = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")


@functools.cache
def library() -> ctypes.CDLL:
    parts = ("machine.cpp", "races.cpp", "async.cpp")
    sources = [*host.HERE.glob("*.cu"), *(host.HERE / part for part in parts)]
    loaded = ctypes.CDLL(str(host.build_with_ninja("cuda-host-faults", "faults.so", sources)))
    loaded.run.restype = loaded.multiply.restype = ctypes.c_char_p
    return loaded


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def run(kernel: str, order: int = 0) -> tuple[str, torch.Tensor]:
    out = torch.full((64,), -1.0)
    return library().run(kernel.encode(), order, pointer(out)).decode(), out


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("neighbours", torch.arange(1, 65) % 64),
        ("neighbours in a warp", torch.arange(64) ^ 1),
        ("copied", torch.arange(1, 65) % 64),
    ],
)
def test_sound_kernels_pass(kernel, expected, order):
    said, out = run(kernel, order)
    assert said == "" and torch.equal(out, expected.float())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("neighbours, no barrier", r"a race: thread \d+ (reads|writes) byte \d+ of shared memory"),
        ("neighbours in a warp, no barrier", "a race"),
        ("overwritten", "a race"),
        ("two barriers", r"waits at __syncthreads \(.*faults.cu:\d+\) and thread 32 at"),
        ("half a warp", r"it waits for thread \d+, which has ended|waits for ever at __shfl_xor"),
        ("not in mask", "is not in its own mask"),
        ("different operations", "is at __(syncwarp|ballot_sync)"),
        (
            "overlapping, one does not wait",
            "thread 40 ends and has not waited for the kernel",
        ),
        ("copied, no wait", "a race: .* is copying to"),
        ("copied, no barrier", "a race"),
        ("copies left open", "cp.async copies that it has not waited for"),
    ],
)
def test_faults_are_found(kernel, says, order):
    said, _ = run(kernel, order)
    assert said.startswith(f"kernel {kernel}: block 0: ")
    assert re.search(says, said), said


def test_a_kernel_that_overlaps_and_waits_passes():
    assert run("overlapping")[0] == ""


def test_shared_memory_starts_as_nan():
    assert run("reads undefined")[1].isnan().all()


def test_threads_run_in_the_order_that_is_asked_for():
    assert [float(run("in order", order)[1][0]) for order in (0, 1)] == [63.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_instructions_multiply_matrices(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.empty(16, 8)
    given = b if transposed else b.t().contiguous()
    said = library().multiply(
        pointer(a), pointer(given), pointer(c), transposed, dtype is torch.bfloat16
    )
    assert said == b""
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_convert_as_torch_does(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    floats = every.float()
    # Every number, the floats beside it and those half way to the next.
    near = torch.cat([floats, floats.nextafter(torch.tensor(9e9)), floats.nextafter(-floats)])
    between = (floats[:-1] + floats[1:]) / 2
    floats = torch.cat([near, between, torch.tensor([65519.9, 65520.0, 3.4e38, 1e-8, 2**-25])])
    widened, narrowed = torch.empty(65536), torch.empty(len(floats), dtype=torch.int16)
    is_bf16 = dtype is torch.bfloat16
    library().convert(is_bf16, pointer(widened), pointer(floats), pointer(narrowed), len(floats))
    torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        narrowed.view(dtype).float(), floats.to(dtype).float(), rtol=0, atol=0, equal_nan=True
    )
