"""Tensors that are not what their memory holds: negated ones are read with their sign, and one
whose storage was freed is refused in words."""

from __future__ import annotations

import pytest
import torch

from llama_fast import rms_norm, swiglu
from llama_fast.dispatch import OPS
from llama_fast.dispatch.signature import call_signature, read_by_python
from llama_fast.errors import ShapeError
from llama_fast.ops import linear

from .backends import BACKENDS, device, name_of, on
from .oracle import as_tuple, copies
from .test_library import FORMS


def floats(args: tuple) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def backend_of(entry: object) -> str:
    return name_of(entry).split("-")[0]


def negated(x: torch.Tensor) -> torch.Tensor:
    """x, as a view of memory that holds -x."""
    return torch._neg_view(x.neg())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_negated_tensors(backend, form):
    op, args, _ = FORMS[form]
    where = device(name_of(backend))
    args = tuple(a.to(where) if isinstance(a, torch.Tensor) else a for a in args)
    with on(name_of(backend)), torch.no_grad():
        plain = copies(args)
        if reasons := op.explain(*plain).reasons[backend_of(backend)]:
            pytest.skip(f"{backend} does not serve it: {reasons[0]}")
        expected = [*as_tuple(op(*plain)), *(a for a in plain if isinstance(a, torch.Tensor))]
        for i in floats(args):
            given = [*copies(args)]
            given[i] = negated(given[i])
            if op.writes and i in op.arguments.written:
                with pytest.raises(ShapeError, match=r"the op writes it.*resolve_neg"):
                    op(*given)
                continue
            found = [*as_tuple(op(*given)), *(a for a in given if isinstance(a, torch.Tensor))]
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), f"argument {i}"


def test_the_imaginary_part_of_a_conjugate():
    z = torch.randn(4, 8, dtype=torch.complex64)
    x = z.conj().imag[:, :1]
    assert x.is_neg() and torch.equal(swiglu(x, x), swiglu(x.resolve_neg(), x.resolve_neg()))


@pytest.mark.parametrize("start", [0, 1024, 1 << 22])
def test_a_weight_whose_storage_was_freed(start):
    flat = torch.ones(start + 4096)
    weight = flat[start:].view(64, 64)
    row = weight[0]
    linear(torch.ones(1, 64), weight)
    flat.untyped_storage().resize_(0)
    for rows in (1, 100):
        with pytest.raises(ShapeError, match=r"linear: weight has no memory.*freed"):
            linear(torch.ones(rows, 64), weight)
    with pytest.raises(ShapeError, match="rms_norm: weight has no memory"):
        rms_norm(torch.ones(1, 64, requires_grad=True), row)


@pytest.mark.parametrize("read", [call_signature, read_by_python])
def test_what_torchs_dispatcher_must_see(read):
    x = torch.ones(2, 8)
    freed = torch.ones(2, 8)
    freed.untyped_storage().resize_(0)
    assert read((x, 1.0), False) is not None and read((torch.ones(0, 8),), False) is not None
    for bad in (torch._neg_view(x), freed):
        assert read((x, bad), False) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 28, 29, 100])
def test_a_weight_of_no_rows(backend, dtype, rows):
    where = device(name_of(backend))
    x = torch.ones(rows, 64, dtype=dtype, device=where, requires_grad=True)
    weight = torch.ones(0, 64, dtype=dtype, device=where)
    with on(name_of(backend)):
        if reasons := OPS["linear"].explain(x, weight).reasons[backend_of(backend)]:
            pytest.skip(f"{backend} does not serve it: {reasons[0]}")
        y = linear(x, weight)
        assert y.shape == (rows, 0) and y.dtype is dtype
        y.sum().backward()
    assert not x.grad.any()
