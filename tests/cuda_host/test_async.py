"""What the machine does beside a block's threads, as sm_90 does: bulk copies, barriers in shared
memory, products of warpgroups; what it computes, and the faults it finds."""

from __future__ import annotations

import ctypes
import re
from ctypes import c_uint64

import pytest
import torch

from . import host
from .test_machine import library, pointer

pytestmark = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")

BOX = 64 * 64


def run(kernel: str, order: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    ask = library().run_async
    ask.restype = ctypes.c_char_p
    tensor = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.full((2 * BOX,), -1.0)
    return ask(kernel.encode(), order, pointer(tensor), pointer(out)).decode(), tensor, out


def swizzled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 64 half numbers as they lie in shared memory: chunk c of row r at c ^ (r % 8)."""
    chunks = rows.view(-1, 8, 8)
    r = torch.arange(len(rows)).view(-1, 1)
    return chunks[r, torch.arange(8) ^ (r % 8)].reshape(rows.shape)


@pytest.mark.parametrize("order", [0, 1])
def test_sound_kernels_pass(order):
    said, tensor, out = run("boxes", order)
    assert said == "" and torch.equal(out, swizzled(tensor).float().flatten())
    said, _, out = run("products", order)
    assert said == "" and (out[:128] == sum(range(16))).all()
    said, _, out = run("meet", order)
    assert said == "" and torch.equal(out[:256], (torch.arange(256) ^ 64).float())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("box, no wait", "a race|more arrivals at an mbarrier"),
        ("box, wrong parity", "a race|more arrivals at an mbarrier"),
        ("box, mbarrier not started", "an mbarrier is used that has not been started"),
        ("box, start not seen", "a race|has not been started"),
        ("box, nobody arrives", r"waits for ever at mbarrier.try_wait \(.*async_faults.cu:\d+\)"),
        ("box, few bytes", r"a race: thread \d+ reads byte \d+ .* which thread 0 is copying to"),
        ("box, ends early", "bulk copies that it has not waited for"),
        ("box, one warp says", r"a race: thread 0 writes byte \d+ .* which thread \d+ read"),
        ("product, not shown", r"multiplies .* has not shown to the async proxy"),
        ("product, no fence", "without wgmma.fence"),
        ("product, left open", "products that it has not waited for"),
        (
            "product, alone",
            r"wgmma.fence .*it waits for thread \d+, which has ended|waits for ever",
        ),
        ("arrivals left", "arrivals at barrier 1 that nobody has waited for"),
        ("meet, other group", "a race"),
    ],
)
def test_faults_are_found(kernel, says, order):
    said, _, _ = run(kernel, order)
    assert said.startswith(f"kernel {kernel}: block 0: ")
    assert re.search(says, said), said


def test_results_of_products_are_not_there_before_the_wait():
    for order in (0, 1):
        assert run("product, used early", order)[2][:128].isnan().all()


def test_products_that_are_made_late_see_what_is_overwritten():
    sound = float(sum(range(16)))
    assert (run("product, overwritten", 0)[2][:128] != sound).any()
    assert (run("product, A changed", 0)[2][:128] != sound).any()


# Matrices in shared memory, from "Canonical Layouts" of the PTX ISA. The swizzle's rows have 16,
# 32, 64 or 128 bytes; modes are the descriptor's.
MODES = {16: 0, 32: 3, 64: 2, 128: 1}


def offsets(row_bytes: int, mn: int, k_major: bool, leading: int, stride: int) -> torch.Tensor:
    """The byte offset of each element (mn, 16) of half numbers."""
    i, k = torch.arange(mn).view(-1, 1), torch.arange(16).view(1, -1)
    row = row_bytes // 2
    if k_major and row_bytes == 16:
        at = i // 8 * stride + i % 8 * 16 + k // 8 * leading + k % 8 * 2
    elif k_major:
        at = i // 8 * stride + i % 8 * row_bytes + k * 2
    elif row_bytes == 16:
        at = i // 8 * stride + i % 8 * 2 + k % 8 * 16 + k // 8 * leading
    else:
        at = i // row * leading + i % row * 2 + k % 8 * row_bytes + k // 8 * stride
    chunk, line = at // 16, at // 128  # the chunk's number is changed by that of its 128 bytes
    return (chunk ^ (line % 8 & (row_bytes // 16 - 1))) * 16 + at % 16


def descriptor(start: int, row_bytes: int, leading: int, stride: int) -> int:
    address = 1024 + start  # where shared memory begins
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[row_bytes] << 62


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_bytes", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["shared", "registers 64", "registers 128"])
def test_warpgroups_multiply_matrices(kind, row_bytes, dtype):
    g = torch.Generator().manual_seed(0)
    N = 64 if kind == "registers 64" else 128
    a = torch.randn(64, 16, generator=g).to(dtype)
    b = torch.randn(N, 16, generator=g).to(dtype)
    image = torch.full((64 * 1024,), 0x7FFF, dtype=torch.int16)  # NaN

    def place(x: torch.Tensor, start: int, k_major: bool) -> int:
        mn = len(x)
        if k_major:
            leading, stride = (mn * 16, 128) if row_bytes == 16 else (16, 8 * row_bytes)
        elif row_bytes == 16:
            leading, stride = mn * 16, 128
        else:
            stride = 8 * row_bytes
            leading = 2 * stride + 1024  # with a gap
        at = offsets(row_bytes, mn, k_major, leading, stride) + start
        image[at // 2] = x.view(torch.int16)
        return descriptor(start, row_bytes, leading, stride)

    in_shared = kind == "shared"
    b_descriptor = place(b, 0, k_major=in_shared)
    a_descriptor = place(a, 64 * 1024, k_major=True) if in_shared else 0
    out = torch.full((64, N), float("nan"))
    ask = library().wgmma
    ask.restype = ctypes.c_char_p
    said = ask(
        pointer(image), image.numel() * 2, pointer(a), c_uint64(a_descriptor),
        c_uint64(b_descriptor), N, dtype is torch.bfloat16, pointer(out),
    )  # fmt: skip
    assert said == b""
    torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "at", [(0, 0, 0, 0), (64, 3, 2, 1), (96, 40, 1, 0), (0, -5, 0, 1), (0, 48, 3, 0), (0, 0, 0, 2)]
)
def test_boxes_of_a_tensor(at):
    """The tensor (2, 3, 50, 128) by rows of 64 at an odd stride; zeros where there is none."""
    B, K, S, D, rows = 2, 3, 50, 128, 24
    wide = torch.randn(B, S, K, D + 8, generator=torch.Generator().manual_seed(0)).half()
    x = wide[..., :D].transpose(1, 2)
    padded = torch.zeros(B + 1, K + 1, S + 2 * rows, D + 64).half()
    padded[:B, :K, rows : rows + S, :D] = x
    column, row, third, fourth = at
    expected = padded[fourth, third, row + rows : row + 2 * rows, column : column + 64]
    out = torch.empty(rows, 64).half()
    ask = library().box_of
    ask.restype = ctypes.c_char_p
    strides = [2 * x.stride(2), 2 * x.stride(1), 2 * x.stride(0)]
    said = ask(
        pointer(x), (c_uint64 * 4)(D, S, K, B), (c_uint64 * 3)(*strides), rows,
        (ctypes.c_int * 4)(*at), pointer(out),
    )  # fmt: skip
    assert said == b""
    assert torch.equal(out, swizzled(expected))


def test_what_no_tensor_map_takes_is_refused():
    ask = library().box_of
    ask.restype = ctypes.c_char_p
    x = torch.zeros(64).half()
    for sizes, strides in [((64, 0, 1, 1), (128,) * 3), ((64, 4, 1, 1), (130, 128, 128))]:
        said = ask(
            pointer(x), (c_uint64 * 4)(*sizes), (c_uint64 * 3)(*strides), 1,
            (ctypes.c_int * 4)(), pointer(x),
        )  # fmt: skip
        assert b"would refuse" in said
