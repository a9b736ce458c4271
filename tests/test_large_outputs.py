"""Outputs that glibc would map anew for each call lie in memory that is used again."""

from __future__ import annotations

import threading

import pytest
import torch

from llama_fast import swiglu
from llama_fast.backends import cpu
from llama_fast.bench.memory import extra_memory

_cpu = pytest.importorskip("llama_fast._cpu", reason="needs the C++ kernels")
ROWS, F = 512, cpu.MAPPED // 512 // 2  # an output of MAPPED bytes in bfloat16


@pytest.fixture(autouse=True)
def no_idle_blocks():
    _cpu.free_idle_blocks()
    yield
    _cpu.free_idle_blocks()


def of_rows(rows: int, value: float = 1.0) -> torch.Tensor:
    """silu(0) · up = 0 and silu(1) · up = 0.73 · up, of rows · F elements."""
    gate = torch.full((1, 1), value, dtype=torch.bfloat16).expand(rows, F)
    return swiglu(gate.contiguous(), torch.ones(rows, F, dtype=torch.bfloat16))


def test_memory_of_an_output_that_is_gone_is_used_again():
    first = of_rows(ROWS)
    address = first.data_ptr()
    assert address % 2**21 == 0  # whole huge pages
    del first
    assert of_rows(ROWS).data_ptr() == address


def test_outputs_that_are_held_are_left_alone():
    first = of_rows(ROWS)
    view, address = first[3:5], first.data_ptr()
    del first
    second = of_rows(ROWS, value=0.0)
    assert second.data_ptr() != address
    assert not second.any() and (view == view[0, 0]).all() and view[0, 0] > 0.7


def test_an_output_is_like_any_other():
    y = of_rows(ROWS)
    assert y.is_contiguous() and y.dtype is torch.bfloat16 and y.shape == (ROWS, F)
    assert not y._is_view() and y.is_leaf and not y.requires_grad
    y.mul_(2).requires_grad_()
    assert y.float().sum().backward() is None and y.grad is not None


def test_idle_memory_is_bounded():
    _cpu.free_idle_blocks()
    outputs = [of_rows(ROWS) for _ in range(4)]
    addresses = [y.data_ptr() for y in outputs]

    def let_go() -> None:
        while outputs:
            del outputs[0]

    let_go()
    again = [of_rows(ROWS) for _ in range(2)]  # 64 MiB are kept: the two that went last
    assert {y.data_ptr() for y in again} == set(addresses[2:])


def test_an_output_beyond_the_bound_is_not_kept():
    def large() -> None:
        _cpu.free_idle_blocks()
        of_rows(3 * ROWS)

    large()
    held = extra_memory(lambda: None)
    assert held is None or held < 2**21


def test_small_outputs_are_torchs_own():
    assert of_rows(ROWS - 1).untyped_storage().resizable()
    assert not of_rows(ROWS).untyped_storage().resizable()


def test_what_is_kept_is_seen_as_memory_of_a_call():
    of_rows(ROWS)
    held = extra_memory(lambda: of_rows(ROWS))
    if held is None:
        pytest.skip("this system does not say how much memory a process holds")
    assert held >= cpu.MAPPED


def test_threads_may_give_and_take_together():
    wrong = []

    def work(value: float) -> None:
        expected = torch.nn.functional.silu(torch.tensor(value)).bfloat16()
        for _ in range(4):
            y = of_rows(ROWS, value)
            if not (y == expected).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(v),)) for v in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
