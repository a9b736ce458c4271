"""Every op on every backend of this machine, on every case: right, and nothing else touched."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import pytest
import torch

from llama_fast.dispatch import OPS, use_backend
from llama_fast.errors import BackendError
from llama_fast.ops.inputs import randn

from .backends import BACKENDS, CUDA_HOST, device, name_of, on
from .oracle import (
    Expected,
    as_tuple,
    assert_accurate,
    copies,
    expected,
    of_op,
    run_poisoned,
    to_float64,
)

bf16 = torch.bfloat16
FORWARD = {name: op for name, op in OPS.items() if op.cases is not None}

CASES = [
    pytest.param(op, case, dtype, id=f"{name}-{case}-{str(dtype)[6:]}")
    for name, op in FORWARD.items()
    for case in op.cases()
    for dtype in case.dtypes
]


def arguments(case, dtype, backend="cpu"):
    return case.make(torch.Generator().manual_seed(0), dtype, device(backend))


def has_gradient(op, case) -> bool:
    return bool(op.gradient) and (not op.forward_only or op.has_gradient(*arguments(case, bf16)))


def reasons_not_to(op, args, backend) -> str:
    with on(backend):
        reasons = op.explain(*args).reasons[backend.partition("-")[0]]
    return f"the backend says: {'; '.join(reasons)}" if reasons else ""


# All backends of a case follow on one another, so what they are judged by is made once.
@functools.lru_cache(maxsize=1)
def expected_results(op, case, dtype) -> list[Expected]:
    return of_op(op, arguments(case, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_forward(op, case, dtype, backend):
    args = arguments(case, dtype, backend)
    if backend != "eager" and (reasons := reasons_not_to(op, args, backend)):
        pytest.skip(reasons)
    with on(backend):
        actual = run_poisoned(op, args)
    assert_accurate(actual, expected_results(op, case, dtype), f"{op.name} {case}")


# What serves a gradient when nobody asks for a backend: the CPU's kernels and the eager formulas.
DEFAULT = "default"
WITH_GRADIENTS = ("triton", "cuda", CUDA_HOST)
# Why a backend that serves the forward pass may leave the gradient to the next one.
MAY_REFUSE_A_GRADIENT = ("backend has no",)


def differentiable(op, outputs):
    outputs = as_tuple(outputs)
    return outputs[: len(outputs) - op.non_differentiable]


def gradients(op, function, args, grads) -> tuple[torch.Tensor, ...]:
    """Those of the op's float arguments, through `function`, for these gradients of its outputs."""
    leaves = [
        a.detach().requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point() and x.name not in op.constants
        else a
        for a, x in zip(copies(args), op.arguments.schema, strict=True)
    ]
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    results = differentiable(op, function(*leaves))
    grads = [g.to(r) for g, r in zip(grads, results, strict=True)]
    found = torch.autograd.grad(results, wanted, grads, allow_unused=True)
    return tuple(
        g if g is not None else torch.zeros_like(w) for g, w in zip(found, wanted, strict=True)
    )


@functools.lru_cache(maxsize=1)
def expected_gradients(op, case, dtype) -> tuple[list[torch.Tensor], list[Expected]]:
    """Gradients of the outputs, and those of the arguments that follow from them."""
    args = arguments(case, dtype)
    generator = torch.Generator().manual_seed(1)
    outputs = differentiable(op, op.eager(*copies(args)))
    grads = [randn(generator, *o.shape, dtype=o.dtype) for o in outputs]
    return grads, expected(lambda *given: gradients(op, op.eager, given, grads), args)


@pytest.mark.parametrize(
    "backend", [DEFAULT, *(b for b in BACKENDS if name_of(b) in WITH_GRADIENTS)]
)
@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [c for c in CASES if has_gradient(*c.values[:2])],
)
def test_gradient(op, case, dtype, backend):
    args = arguments(case, dtype, backend)
    if backend != DEFAULT and (reasons := reasons_not_to(op, args, backend)):
        pytest.skip(reasons)
    grads, wanted = expected_gradients(op, case, dtype)
    try:
        with nullcontext() if backend == DEFAULT else on(backend):
            actual = gradients(op, op, args, grads)
    except BackendError as error:
        if not any(reason in str(error) for reason in MAY_REFUSE_A_GRADIENT):
            raise
        pytest.skip(str(error))
    assert_accurate(actual, wanted, f"{op.name} gradient {case}")
    if backend == DEFAULT and dtype == torch.float32:
        with use_backend("eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formula = gradients(op, op, to_float64(args), grads)
        # The formula itself, where rounding hides nothing.
        for f, of in zip(formula, wanted, strict=True):
            torch.testing.assert_close(f, of.exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORWARD)
def test_cost_counts_at_least_the_tensors(name):
    op = FORWARD[name]
    args = arguments(op.cases()[0], torch.bfloat16)
    cost = op.cost(*args)
    assert cost.bytes > 0 and cost.flops > 0
