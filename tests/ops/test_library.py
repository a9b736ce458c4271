"""Every op is a good citizen of torch.library: opcheck passes, and it compiles in one graph."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast.ops  # noqa: F401  declares the ops
from llama_fast.dispatch import OPS

from .oracle import as_tuple, copies


def small(op) -> dict[str, tuple[tuple, bool]]:
    """Of each form of the op, by its label: the arguments of the smallest case that is not empty
    and has numbers for results, and whether it has a gradient."""

    def elements(args):
        return sum(a.numel() for a in args if isinstance(a, torch.Tensor))

    def usable(args):
        if not all(a.numel() for a in args if isinstance(a, torch.Tensor)):
            return False
        with torch.no_grad():
            return all(y.isfinite().all() for y in as_tuple(op.eager(*copies(args))))

    made = [
        case.make(torch.Generator().manual_seed(0), torch.float32, "cpu") for case in op.cases()
    ]
    found: dict[str, tuple[tuple, bool]] = {}
    for args in sorted(made, key=elements):
        label = op.label(*args)
        if label not in found and usable(args):
            found[label] = args, op.has_gradient(*args)
    return found


# Each form of each op, by its label: the op, arguments, and whether it has a gradient.
FORMS = {
    label: (op, args, with_gradient)
    for op in OPS.values()
    if op.cases is not None
    for label, (args, with_gradient) in small(op).items()
}
SMALL = [pytest.param(*form, id=label) for label, form in FORMS.items()]


def leaves(op, args: tuple) -> tuple:
    """`args`, with a gradient due to all that have one."""
    return tuple(
        a.detach().requires_grad_()
        if isinstance(a, torch.Tensor)
        and a.is_floating_point()
        and argument.name not in op.constants
        else a
        for a, argument in zip(copies(args), op.arguments.schema, strict=True)
    )


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
def test_opcheck(op, args, with_gradient):
    given = leaves(op, args) if with_gradient else copies(args)
    torch.library.opcheck(op.torch_op, given)


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
def test_compiles_in_one_graph(op, args, with_gradient):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    ours, theirs = (leaves(op, args) if with_gradient else copies(args) for _ in range(2))
    expected, actual = as_tuple(op(*ours)), as_tuple(compiled(*theirs))
    for e, a in zip(expected, actual, strict=True):
        assert torch.equal(e, a)
    if with_gradient:
        sum(e.sum() for e in expected).backward()
        sum(a.sum() for a in actual).backward()
    for e, a in zip(ours, theirs, strict=True):
        if isinstance(e, torch.Tensor):
            assert torch.equal(e, a)  # what the op writes
            assert e.grad is a.grad is None or torch.equal(e.grad, a.grad)


class Computed(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class GivesNone(torch.autograd.Function):
    """The identity, whose gradient is not defined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(
    ("op", "args", "with_gradient"),
    [form for form in SMALL if form.values[0].non_differentiable and form.values[2]],
)
def test_results_that_no_gradient_reaches_have_no_zeros_for_one(op, args, with_gradient):
    """Autograd makes them unless it is told: as many as dw of the loss has elements."""
    given = leaves(op, args)
    result, *_ = op(*given)
    with Computed() as computed:
        result.sum().backward()
    assert "aten.zeros.default" not in computed.names and len(computed.names) > 2
    assert any(isinstance(a, torch.Tensor) and a.grad is not None for a in given)
    given = leaves(op, args)
    GivesNone.apply(op(*given)[0]).sum().backward()
    assert all(a.grad is None or not a.grad.any() for a in given if isinstance(a, torch.Tensor))
