"""linear with the epilogue swiglu: the bits of the two ops that it stands for, in one launch where
there is a kernel; what it does where a gradient is due; how the model calls it. `test_ops.py`
judges its accuracy."""

from __future__ import annotations

import pytest
import torch

import llama_fast
from llama_fast import QuantizedWeight, linear, swiglu
from llama_fast.dispatch import record_decisions, use_backend
from llama_fast.errors import ShapeError
from llama_fast.nn import MLP

from ..cuda_host import host
from .backends import BACKENDS, CUDA_HOST, device, name_of, on
from .oracle import same_bits

HALF = [torch.bfloat16, torch.float16]
# Of a weight (2F, C_in): as it is, or (bits, group_size, symmetric).
FORMS = [None, (8, 64, True), (8, 32, False), (4, 32, True), (4, 128, False)]
OURS = [b for b in BACKENDS if name_of(b) != "eager"]


def operands(M: int, C_in: int, F: int, dtype: torch.dtype, form: tuple | None, to: str = "cpu"):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * F, C_in, generator=g) * 4 * C_in**-0.5
    x = torch.randn(M, C_in, generator=g).to(to, dtype)
    if form is not None:
        return x, QuantizedWeight.from_float(weight, *form).to(to)
    return x, weight.to(to, dtype)


def linear_swiglu(x, weight):
    return linear(x, weight, epilogue="swiglu")


def one_after_the_other(x, weight):
    return swiglu(*linear(x, weight).chunk(2, dim=-1))


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_it_has_the_bits_of_the_two_ops(backend, dtype, form):
    """F 13 is not a whole block, and neither gate nor up begin at a multiple of 16 rows then."""
    for M, C_in, F in [(1, 264, 13), (9, 1160, 24), (16, 72, 40)]:
        x, weight = operands(M, C_in, F, dtype, form, device(name_of(backend)))
        with on(backend):
            expected = one_after_the_other(x, weight)
            assert expected.isfinite().all() and expected.count_nonzero() > 0.9 * expected.numel()
            assert same_bits(linear_swiglu(x, weight), expected), f"{M} rows"


@pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_on_cuda_it_is_one_launch(form):
    x, weight = operands(2, 64, 40, torch.bfloat16, form)
    with on(CUDA_HOST):
        host.take_launches()
        linear_swiglu(x, weight)
        (launch,) = host.take_launches()
    assert launch.kernel == f"linear_swiglu{'_quantized' if form else ''}_fwd"
    assert launch.blocks == 5  # of 8 outputs


@pytest.mark.parametrize("form", [None, (8, 64, True)], ids=str)
def test_a_gradient_keeps_gate_and_up(form):
    """The same as of the two ops; the op itself, which computes them anew, gives it too."""
    x, weight = operands(5, 70, 12, torch.float32, form)
    grad = torch.randn(5, 12)
    found = []
    for function in (one_after_the_other, linear_swiglu):
        given = x.clone().requires_grad_()
        h = function(given, weight)
        found.append((h, *torch.autograd.grad(h, given, grad)))
    assert found[1][0].grad_fn.name() == found[0][0].grad_fn.name()
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)


def test_what_it_refuses():
    x = torch.ones(2, 64)
    with pytest.raises(
        ShapeError, match=r"linear: the weight has 5 rows; with swiglu.*\(2F, C_in\)"
    ):
        linear_swiglu(x, torch.ones(5, 64))
    with pytest.raises(ShapeError, match=r"linear: x has shape.*and 64 is not 63"):
        linear_swiglu(x, torch.ones(6, 63))
    odd = QuantizedWeight.from_float(torch.ones(5, 64), 8, 64)
    with pytest.raises(ShapeError, match="linear: the weight has 5 rows"):
        linear_swiglu(x, odd)
    with pytest.raises(ShapeError, match="linear: x has shape"):
        linear_swiglu(x[:, :8], odd)
    with pytest.raises(ShapeError, match="epilogue is 'gelu'; it must be 'swiglu' or None"):
        linear(x, torch.ones(6, 64), epilogue="gelu")


def test_the_model_calls_it_and_hooks_see_what_goes_in():
    mlp = MLP(64, 96).eval()
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, seen = torch.randn(1, 3, 64), []
    mlp.gate_up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), record_decisions() as decisions:
        y = mlp(x)
    assert [d.op for d in decisions] == ["linear swiglu", "linear"] and seen == [x]
    with record_decisions() as decisions:
        trained = mlp(x)
    assert [d.op for d in decisions] == ["linear", "swiglu", "linear"]
    torch.testing.assert_close(trained, y)


def test_explain_says_how():
    x, weight = operands(3, 64, 8, torch.bfloat16, None)
    with use_backend("cpu"):
        said = str(llama_fast.explain("linear", x, weight, epilogue="swiglu"))
    assert "by linear and swiglu, one after the other" in said
