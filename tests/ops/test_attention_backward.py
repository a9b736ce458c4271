"""The gradients of attention in C++: on every instruction set, and what they depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llama_fast import attention
from llama_fast.backends import cpu
from llama_fast.dispatch import OPS

from .backends import BACKENDS, name_of, on
from .oracle import assert_accurate
from .test_ops import arguments, expected_gradients, gradients

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
OP = OPS["attention"]
ON_CPU = [b for b in BACKENDS if name_of(b).startswith("cpu-")]
# A few cases of each kind; the best instruction set of this CPU runs all of them in test_ops.py.
CASES = {
    "prefill": (f32, bf16),
    "group of 3": (bf16, f16),
    "group of 16": (f32,),
    "more queries than keys": (f32,),
    "no keys": (f32,),
    "ragged": (f32, bf16),
    "not causal": (bf16,),
    "packed, odd lengths": (f32, bf16),
    "packed, slices of a fused projection": (bf16,),
}
needs_cpu = pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("case", "dtype"), [(name, dtype) for name, dtypes in CASES.items() for dtype in dtypes]
)
def test_it_is_accurate(case, dtype, backend):
    case = next(c for c in OP.cases() if str(c) == case)
    grads, wanted = expected_gradients(OP, case, dtype)
    with on(backend):
        actual = gradients(OP, OP, arguments(case, dtype), grads)
    assert_accurate(actual, wanted, f"attention gradient {case}")


def inputs(B: int, T: int, S: int, H: int, K: int, D: int, dtype: torch.dtype) -> list:
    """q, k, v and a gradient of o."""
    g = torch.Generator().manual_seed(0)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def backward(q, k, v, grad, **given) -> tuple[torch.Tensor, ...]:
    """Of contiguous outputs that start as NaN."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, **given)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        return torch.autograd.grad(o, leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@needs_cpu
def test_the_cpu_serves_it():
    q, k, v, grad = inputs(1, 3, 3, 2, 1, 8, bf16)
    o, lse = OP(q, k, v, True, None, None, True)
    decision = OPS["attention_backward"].explain(grad, q, k, v, o, lse, True, None, None)
    assert decision.chosen == "cpu", str(decision)
    decision = OPS["attention_backward"].explain(grad, q, k, v, o, lse.double(), True, None, None)
    assert "lse is torch.float64" in decision.reasons["cpu"][0]


@needs_cpu
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_a_row_depends_on_itself_alone(isa, dtype):
    """Neither on the rows beside it, nor on what lies behind its length, nor on threads."""
    T, lengths = 70, [200, 3, 0, 131]
    q, k, v, grad = inputs(len(lengths), T, 200, 6, 2, 40, dtype)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = math.nan
    before = torch.get_num_threads()
    try:
        with on(f"cpu-{isa}"):
            torch.set_num_threads(1)
            together = backward(q, k, v, grad, lengths=torch.tensor(lengths))
            assert all(x.isfinite().all() for x in together)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                again = backward(q, k, v, grad, lengths=torch.tensor(lengths))
                assert all(map(torch.equal, again, together)), threads
            for b, n in enumerate(lengths):
                t = max(0, T - n)
                alone = backward(
                    *(x[b : b + 1] for x in (q[:, t:], k[:, :n], v[:, :n], grad[:, t:]))
                )
                dq, dk, dv = (x[b : b + 1] for x in together)
                assert torch.equal(dq[:, t:], alone[0]) and not dq[:, :t].any()
                for of_all, of_one in ((dk, alone[1]), (dv, alone[2])):
                    assert torch.equal(of_all[:, :n], of_one) and not of_all[:, n:].any()
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("causal", [True, False])
def test_a_document_depends_on_itself_alone(isa, causal):
    """Its results and gradients are those it has alone, bit by bit, on any number of threads; NaN
    in another document stays there."""
    lengths = [7, 1, 0, 110, 0, 260, 3]
    q, k, v, grad = inputs(1, sum(lengths), sum(lengths), 4, 1, 24, f32)
    at = slice(118 + 260, None)
    q[:, at] = k[:, at] = v[:, at] = grad[:, at] = math.nan
    given = {"causal": causal, "cu_seqlens": cu_seqlens(lengths)}
    before = torch.get_num_threads()
    try:
        with on(f"cpu-{isa}"):
            o = attention(q, k, v, **given)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found = backward(q, k, v, grad, **given)
                begin = 0
                for n in lengths[:-1]:
                    one = slice(begin, begin := begin + n)
                    alone = [x[:, one] for x in (q, k, v, grad)]
                    assert torch.equal(o[:, one], attention(*alone[:3], causal=causal))
                    for of_all, of_one in zip(found, backward(*alone, causal=causal), strict=True):
                        assert torch.equal(of_all[:, one], of_one), (threads, n)
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e8])
def test_scales_of_any_size(scale):
    """Weights are equal at 0; at 1e8 one key has all of it, and gradients are finite."""
    q, k, v, grad = inputs(1, 30, 30, 2, 1, 16, f32)
    with on("cpu"):
        found = backward(q, k, v, grad, scale=scale)
    with on("eager"):
        wanted = backward(*(x.double() for x in (q, k, v, grad)), scale=scale)
    for f, w in zip(found, wanted, strict=True):
        assert f.isfinite().all()
        if scale < 1e8:  # there the gradient of a score is as uncertain as the softmax is sharp
            torch.testing.assert_close(f.double(), w, rtol=1e-4, atol=1e-5)


@needs_cpu
def test_gradients_of_any_strides():
    q, k, v, grad = inputs(2, 33, 33, 4, 2, 32, f32)
    with on("cpu"):
        wanted = backward(q, k, v, grad)
        turned = grad.transpose(1, 2).contiguous().transpose(1, 2)
        assert all(map(torch.equal, backward(q, k, v, turned), wanted))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attention(*leaves).sum().backward()  # of stride 0 in every dim
        of_ones = backward(q, k, v, torch.ones_like(grad))
        assert all(torch.equal(x.grad, w) for x, w in zip(leaves, of_ones, strict=True))
