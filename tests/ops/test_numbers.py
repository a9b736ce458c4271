"""Numbers that a call gives as a tensor, or as another library's: they are read in every call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llama_fast import ops
from llama_fast.backends import cpu, triton
from llama_fast.dispatch import OPS
from llama_fast.errors import GradientError
from llama_fast.ops.quantized_kv import quantize

from ..cuda_host import host
from .backends import CUDA_HOST, device, on, unless
from .oracle import as_tuple, copies

# One of each kind: what is remembered does not depend on the instruction set.
BACKENDS = [
    "eager",
    *(f"cpu-{isa}" for isa in cpu.isas()[:1]),
    pytest.param(
        "triton", marks=unless("" if triton.INTERPRETED else "this needs its interpreter")
    ),
    pytest.param(CUDA_HOST, marks=unless(host.why_not())),
]


class Float(float):
    """Equal to every other one, as a remembered call sees it."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def dressed(value):
    """The same number in other clothes, of the kinds that torch's own functions take."""
    tensors = [torch.tensor(value)]
    if isinstance(value, bool):
        return [*tensors, np.bool_(value)]
    if isinstance(value, int):
        return [*tensors, np.int64(value), torch.tensor(value, dtype=torch.int32)]
    return [*tensors, torch.tensor([value]).double(), np.float64(value), Float(value)]


# What another number of them would not fit: sizes, shares of 1, and a seed that may be None.
FIXED = {"C_out", "V", "bits", "group_size", "beta1", "beta2", "seed"}


def calls():
    """Each op with a number, and each of its numbers that may have another value."""
    for op in OPS.values():
        if op.cases is None:
            continue
        arguments = op.arguments.schema
        for index in op.arguments.numbers:
            if arguments[index].name not in FIXED:
                yield pytest.param(op, index, id=f"{op.name}-{arguments[index].name}")


def arguments(op, backend) -> tuple:
    """Of the first case that the backend serves."""
    for case in op.cases()[1:]:
        made = case.make(torch.Generator().manual_seed(0), torch.bfloat16, device(backend))
        with on(backend):
            if not op.explain(*made).reasons[backend.partition("-")[0]]:
                return made
    return pytest.skip(f"{backend} serves none of its cases")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "index"), list(calls()))
def test_the_number_of_each_call_is_read(op, index, backend):
    made = arguments(op, backend)
    first = 0.3 if made[index] is None else made[index]

    def run(number) -> list[torch.Tensor]:
        args = copies(made)
        with on(backend), torch.no_grad():
            return as_tuple(op(*args[:index], number, *args[index + 1 :]))

    for value in (first, not first if isinstance(first, bool) else first * 3):
        expected = run(value)
        # Which number it is, is found out before a backend is chosen: one is enough for slow ones.
        for number in dressed(value) if backend.startswith("cpu") else [torch.tensor(value)]:
            for x, y in zip(run(number), expected, strict=True):
                assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_the_number_of_each_call_is_read_where_a_gradient_is_recorded():
    x, weight = torch.randn(3, 64, requires_grad=True), torch.ones(64)
    for eps in (1e-5, 10.0):
        y = ops.rms_norm(x, weight, torch.tensor(eps))
        assert torch.equal(y, ops.rms_norm(x, weight, eps))
        wanted = torch.autograd.grad(ops.rms_norm(x, weight, eps).sum(), x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.rms_norm(x, weight, torch.tensor(eps)), y)


@pytest.mark.parametrize(
    "wrong",
    ["1", [1.0], torch.ones(2), np.ones(1), 1j, object()],
    ids=["text", "list", "tensor", "array", "complex", "object"],
)
def test_what_is_no_number_is_refused(wrong):
    x, weight = torch.randn(3, 64), torch.ones(64)
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(TypeError, match=r"rms_norm: eps is a .*; it must be a float"):
            ops.rms_norm(given, weight, wrong)


def test_a_number_has_no_gradient():
    q = torch.randn(1, 3, 2, 16)
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(GradientError, match=r"attention: scale requires .* scale\.detach"):
        ops.attention(q, q, q, scale=scale)
    with torch.no_grad():
        y = ops.attention(q, q, q, scale=scale)
    assert torch.equal(y, ops.attention(q, q, q, scale=scale.item()))
    assert torch.equal(y, ops.attention(q, q, q, scale=scale.detach()))


@pytest.mark.parametrize("quantized", [False, True])
def test_an_empty_result_belongs_to_one_call(quantized):
    """Attention's lse, where none is needed: one of inference mode could not be saved later."""
    q = torch.randn(1, 5, 2, 16)
    kv, scales = (q, q), ()
    if quantized:
        values, scale = quantize(q)
        kv, scales = (values, values), (scale, scale)
    with torch.inference_mode():
        first = OPS["attention"](q, *kv, True, None, None, False, *scales)[1]
    second = OPS["attention"](q, *kv, True, None, None, False, *scales)[1]
    assert first.is_inference() and not second.is_inference()
