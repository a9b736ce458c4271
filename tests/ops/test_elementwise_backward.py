"""The gradients of the norms and of swiglu in C++: who serves them, threads, strides, NaN."""

from __future__ import annotations

import pytest
import torch

from llama_fast.backends import cpu
from llama_fast.dispatch import OPS

from .backends import on

BACKWARD = ("rms_norm_backward", "add_rms_norm_backward", "swiglu_backward")


def arguments(name: str, N: int, C: int, dtype: torch.dtype = torch.float32) -> tuple:
    g = torch.Generator().manual_seed(N + C)
    grad, other, x = (torch.randn(N, C, generator=g).to(dtype) for _ in range(3))
    if name == "swiglu_backward":
        return grad, other, x
    weight = torch.randn(C, generator=g).to(dtype)
    given = (grad, x, weight, 1e-5)
    return given if name == "rms_norm_backward" else (grad, other, *given[1:])


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_serves_them(name, dtype):
    decision = OPS[name].explain(*arguments(name, 3, 8, dtype))
    assert decision.chosen == "cpu", str(decision)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize(("N", "C"), [(33, 40), (130, 1030), (2100, 24)])
def test_the_bits_do_not_depend_on_threads(name, N, C):
    found, before = [], torch.get_num_threads()
    args = arguments(name, N, C, torch.bfloat16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with on("cpu"):
                found.append(OPS[name](*args))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("name", BACKWARD[:2])
@pytest.mark.parametrize("N", [1, 31, 32, 33, 64, 65, 2047, 2049])
def test_every_row_is_in_one_part_of_dw(isa, name, N):
    """Rows lost or counted twice where blocks of rows meet would show."""
    args = arguments(name, N, 19)
    exact = OPS[name].eager(*(a.double() if torch.is_tensor(a) else a for a in args))
    with on(f"cpu-{isa}"):
        found = OPS[name](*args)
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6 * N**0.5)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_layout(name, dtype):
    """autograd gives that of a sum with stride 0, and that of a transposed tensor transposed."""
    args = arguments(name, 6, 35, dtype)
    for grad in (torch.ones((), dtype=dtype).expand(6, 35), args[0].t().contiguous().t()):
        with on("cpu"):
            found = OPS[name](grad, *args[1:])
            wanted = OPS[name](grad.contiguous(), *args[1:])
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", BACKWARD)
def test_a_row_that_is_not_finite_spoils_no_other(name):
    args = arguments(name, 70, 24)
    x = args[2] if name == "add_rms_norm_backward" else args[1]
    x[3, 5] = float("nan")
    with on("cpu"):
        found = OPS[name](*args)
    wanted = OPS[name].eager(*args)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0].isnan().any() and found[0][4:].isfinite().all()


def test_swiglu_where_the_sigmoid_ends():
    gate = torch.tensor([[-1e30, -200.0, -90.0, -1.278, 0.0, 90.0, 200.0, 1e30]])
    grad, up = torch.ones_like(gate), torch.full_like(gate, 2.0)
    for dtype in (torch.float32, torch.bfloat16):
        args = [a.to(dtype) for a in (grad, gate, up)]
        with on("cpu"):
            found = OPS["swiglu_backward"](*args)
        for f, w in zip(found, OPS["swiglu_backward"].eager(*args), strict=True):
            torch.testing.assert_close(f, w, rtol=1e-2, atol=2e-3)
