"""What a later op needs in its backward pass, and an earlier one can make again: h of swiglu."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from llama_fast import ops


def leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """gate and up (6, 40), and a matrix (9, 40)."""
    g = torch.Generator().manual_seed(0)
    sizes = ((6, 40), (6, 40), (9, 40))
    return [torch.randn(*size, generator=g).to(dtype).requires_grad_() for size in sizes]


def plain(gate: torch.Tensor, up: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return ops.linear(ops.swiglu(gate, up), matrix).float().square().sum()


def kept(function: Callable, *args: torch.Tensor) -> list[torch.Tensor]:
    """The gradients where each op keeps what it needs itself."""
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        result = function(*args)
    return list(torch.autograd.grad(result, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_h_is_let_go_and_the_gradients_have_the_same_bits(dtype):
    gate, up, matrix = leaves(dtype)
    h = ops.swiglu(gate, up)
    y, of_h = ops.linear(h, matrix).float().square().sum(), weakref.ref(h)
    del h
    assert of_h() is None
    found = torch.autograd.grad(y, (gate, up, matrix))
    for a, b in zip(found, kept(plain, gate, up, matrix), strict=True):
        assert torch.equal(a, b)


def test_a_frozen_matrix_keeps_neither():
    gate, up, matrix = leaves()
    y = ops.linear(ops.swiglu(gate, up), matrix.detach())
    assert {x.shape for x in y.grad_fn.saved_tensors if x is not None} == {matrix.shape}


def test_what_was_changed_in_place_is_kept():
    def changed(gate, up, matrix):
        h = ops.swiglu(gate, up)
        with torch.no_grad():
            h[:, :7] = 0
        return ops.linear(h, matrix).square().sum()

    args = leaves()
    found = torch.autograd.grad(changed(*args), args)
    assert not found[2][:, :7].any() and found[2][:, 7:].all()
    for a, b in zip(found, kept(changed, *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["aot_eager", "checkpoint", "checkpoint around swiglu"])
def test_beside_other_ways_to_run_it(how):
    args = leaves()
    if how == "aot_eager":
        y = torch.compile(plain, backend=how, fullgraph=True)(*args)
    elif how == "checkpoint":
        y = checkpoint(plain, *args, use_reentrant=False)
    else:
        h = checkpoint(ops.swiglu, *args[:2], use_reentrant=False)
        y = ops.linear(h, args[2]).square().sum()
    found = torch.autograd.grad(y, args)
    for a, b in zip(found, kept(plain, *args), strict=True):
        torch.testing.assert_close(a, b)


def test_second_gradients():
    args = leaves()

    def slope(gate, up, matrix):
        (d,) = torch.autograd.grad(plain(gate, up, matrix), matrix, create_graph=True)
        return d.square().sum()

    for a, b in zip(torch.autograd.grad(slope(*args), args), kept(slope, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
