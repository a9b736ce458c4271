"""A gradient of a gradient (create_graph=True) is that of the definition, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from llama_fast import linear_cross_entropy, use_backend
from llama_fast.dispatch import OPS
from llama_fast.errors import BackendError

from .oracle import as_tuple
from .test_library import SMALL, leaves

WITH_GRADIENT = [form for form in SMALL if form.values[2]]


def needing(args: tuple) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def gradients(op, function, args: tuple) -> list[torch.Tensor]:
    """Of a scalar made of the results of `function(*args)`: first gradients, and those of another
    scalar that is made of these."""
    g = torch.Generator().manual_seed(1)

    def scalar(tensors):
        tensors = [t for t in tensors if t is not None]
        weights = (torch.rand(t.shape, generator=g) for t in tensors)
        return sum((t.double().square() * w).sum() for t, w in zip(tensors, weights, strict=True))

    results = as_tuple(function(*args))
    results = results[: len(results) - op.non_differentiable]
    found = torch.autograd.grad(scalar(results), needing(args), create_graph=True)
    return [*found, *torch.autograd.grad(scalar(found), needing(args))]


def close(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        a, e = a.detach().double(), e.detach().double()
        torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-4 * float(e.abs().max()))


@pytest.mark.parametrize(("op", "args", "with_gradient"), WITH_GRADIENT)
@pytest.mark.parametrize("run", ["op", "compiled"])
def test_it_is_that_of_the_definition(op, args, with_gradient, run):
    torch._dynamo.reset()
    function = op if run == "op" else torch.compile(lambda *a: op(*a), backend="eager")
    actual = gradients(op, function, leaves(op, args))
    close(actual, gradients(op, op.eager, leaves(op, args)))


@pytest.mark.parametrize(("op", "args", "with_gradient"), WITH_GRADIENT)
def test_a_compiled_graph_refuses(op, args, with_gradient):
    """torch's own compiler has no second gradients, and says so."""
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="double backward"):
        gradients(op, torch.compile(lambda *a: op(*a), backend="aot_eager"), leaves(op, args))


@pytest.mark.parametrize(("op", "args", "with_gradient"), WITH_GRADIENT)
def test_a_first_gradient_is_still_the_kernels(op, args, with_gradient):
    """What create_graph=True gives agrees with it, and leaves the graph as it was."""
    given = leaves(op, args)
    results = as_tuple(op(*given))
    total = sum(r.sum() for r in results[: len(results) - op.non_differentiable])
    watched = torch.autograd.grad(total, needing(given), create_graph=True)
    first = torch.autograd.grad(total, needing(given), retain_graph=True)
    again = torch.autograd.grad(total, needing(given))
    close(first, watched)
    assert all(map(torch.equal, first, again))
    assert not any(f.requires_grad for f in first)


@pytest.mark.parametrize("name", ["linear", "linear_cross_entropy"])
def test_rounding_to_8_bits_counts_as_the_identity(name):
    """That of x beside a quantised weight: in a gradient that is to be differentiated too."""
    op = OPS[name]
    made = [
        c.make(torch.Generator().manual_seed(0), torch.bfloat16, "cpu")
        for c in op.cases()
        if torch.bfloat16 in c.dtypes
    ]
    args = next(args for args in made if op.label(*args) == f"{name} int8" and args[0].numel() > 99)
    given = leaves(op, args)
    first = torch.autograd.grad(as_tuple(op(*given))[0].sum(), given[0])
    watched = torch.autograd.grad(as_tuple(op(*given))[0].sum(), given[0], create_graph=True)
    error = (watched[0].detach() - first[0]).norm()
    assert 0 < first[0].norm() and error <= 0.01 * first[0].norm()


@pytest.mark.parametrize("targets", [[0, 3, 5], [-100, 3, -100], [-100] * 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_of_a_loss(targets, reduction):
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    found = []
    for function in (
        linear_cross_entropy,
        lambda x, w, t, **options: F.cross_entropy(F.linear(x, w), t, **options),
    ):
        loss = function(x, weight, torch.tensor(targets), reduction=reduction)
        first = torch.autograd.grad(loss.nan_to_num(), (x, weight), create_graph=True)
        total = sum(f.square().sum() for f in first)
        found.append([*first, *torch.autograd.grad(total, (x, weight))])
    close([f.nan_to_num() for f in found[0]], [f.nan_to_num() for f in found[1]])


def test_gradient_ops_called_by_themselves_have_that_of_their_definition():
    op = OPS["swiglu_backward"]
    args = tuple(torch.randn(3, 8, requires_grad=True) for _ in range(3))
    for function in (op, op.torch_op):
        close(gradients(op, function, args), gradients(op, op.eager, args))


def test_another_backend_asked_for_strictly_refuses():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    with use_backend("cpu", strict=True):
        loss = linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64))
        y = OPS["rms_norm"](x, torch.ones(8), 1e-5)
    for result in (loss, y.sum()):
        with pytest.raises(BackendError, match="create_graph"):
            torch.autograd.grad(result, x, create_graph=True)
