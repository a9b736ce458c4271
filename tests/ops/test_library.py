"""Every op is a good citizen of torch.library: opcheck passes, and it compiles in one graph."""

from __future__ import annotations

import pytest
import torch

from llama_fast.dispatch import OPS

from .oracle import as_tuple, copies

FORWARD = {name: op for name, op in OPS.items() if op.cases is not None}


def small(op) -> tuple:
    """The arguments of the op's smallest case that is not empty."""
    cases = [
        case.make(torch.Generator().manual_seed(0), torch.float32, "cpu") for case in op.cases()
    ]

    def elements(args):
        return sum(a.numel() for a in args if isinstance(a, torch.Tensor))

    return min(
        (args for args in cases if all(a.numel() for a in args if isinstance(a, torch.Tensor))),
        key=elements,
    )


def leaves(op, args: tuple) -> tuple:
    """`args`, with a gradient due to all that have one."""
    return tuple(
        a.detach().requires_grad_()
        if op.gradient is not None
        and isinstance(a, torch.Tensor)
        and a.is_floating_point()
        and argument.name not in op.constants
        else a
        for a, argument in zip(copies(args), op._torch_op._schema.arguments, strict=True)
    )


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck(name):
    op = FORWARD[name]
    torch.library.opcheck(op._torch_op, leaves(op, small(op)))


@pytest.mark.parametrize("name", FORWARD)
def test_compiles_in_one_graph(name):
    op = FORWARD[name]
    args = small(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    ours, theirs = leaves(op, args), leaves(op, args)
    expected, actual = as_tuple(op(*ours)), as_tuple(compiled(*theirs))
    for e, a in zip(expected, actual, strict=True):
        assert torch.equal(e, a)
    if op.gradient is not None:
        sum(e.sum() for e in expected).backward()
        sum(a.sum() for a in actual).backward()
    for e, a in zip(ours, theirs, strict=True):
        if isinstance(e, torch.Tensor):
            assert torch.equal(e, a)  # what the op writes
            assert e.grad is a.grad is None or torch.equal(e.grad, a.grad)
