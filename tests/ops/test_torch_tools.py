"""What torch's own tools see of the ops: torch.jit, torch.fx, the FLOP counter, the profiler."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import llama_fast
from llama_fast.dispatch import OPS
from llama_fast.nn import RMSNorm

from .oracle import as_tuple, copies
from .test_library import SMALL, leaves

MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
# torch.jit traces what a function returns.
WITH_RESULTS = [form for form in SMALL if form.values[0].torch_op._schema.returns]
WITH_GRADIENT = [form for form in SMALL if form.values[2]]


class Calls(torch.nn.Module):
    """One op, with everything but its tensors fixed."""

    def __init__(self, op, args: tuple) -> None:
        super().__init__()
        self.op, self.fixed = op, args

    def forward(self, *tensors: torch.Tensor):
        given = iter(tensors)
        return self.op(*(next(given) if isinstance(a, torch.Tensor) else a for a in self.fixed))


def tensors(args: tuple) -> tuple:
    return tuple(a for a in args if isinstance(a, torch.Tensor))


def used(op, results) -> tuple:
    """The results without those that are empty because nobody asked for them."""
    return tuple(r for r in as_tuple(results) if r.numel())


@pytest.mark.parametrize(("op", "args", "with_gradient"), WITH_RESULTS)
@pytest.mark.parametrize("mode", MODES)
def test_jit_traces_calls_of_the_op(op, args, with_gradient, mode):
    g = torch.Generator().manual_seed(5)
    with MODES[mode]():
        traced = torch.jit.trace(
            Calls(op, args).eval(), tensors(copies(args)), check_trace=False, strict=False
        )
        assert f"llama_fast::{op.name}" in str(traced.inlined_graph)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        # Other numbers than those that were traced, of the same meaning where they are integers.
        others = tuple(
            a * torch.rand(a.shape, generator=g).to(a.dtype)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in copies(args)
        )
        expected = used(op, op(*copies(others)))
        for function in (traced, torch.jit.load(file)):
            for _ in range(3):  # the first runs are those of a profile
                actual = used(op, function(*tensors(copies(others))))
                for a, e in zip(actual, expected, strict=True):
                    assert torch.equal(a, e)


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
def test_fx_traces_calls_of_the_op(op, args, with_gradient):
    class Once(torch.nn.Module):
        def forward(self, x):
            return op(x, *args[1:])

    traced = torch.fx.symbolic_trace(Once())
    assert op.torch_op in {node.target for node in traced.graph.nodes}
    args = copies(args)
    actual = traced(args[0].clone())
    for a, e in zip(used(op, actual), used(op, op(*copies(args))), strict=True):
        assert torch.equal(a, e)


def test_jit_script_refuses():
    """It reads the source of functions, and says at which line it cannot."""
    with pytest.raises(ValueError, match=r"return OP\(x, weight, eps\)"):
        torch.jit.script(RMSNorm(8))


def test_a_module_traced_without_a_gradient():
    norm = RMSNorm(8).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(norm, x)
        for given in (x, torch.randn(5, 8)):
            assert torch.equal(traced(given), norm(given))


def flops(run) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_of_the_cost(op, args, with_gradient, mode):
    with MODES[mode]():
        for call in (op, op.torch_op):
            found = flops(lambda call=call: call(*copies(args)))
            assert found == {f"llama_fast.{op.name}": op.cost(*op.complete(args)).flops}


@pytest.mark.parametrize(("op", "args", "with_gradient"), WITH_GRADIENT)
def test_flops_of_gradients_are_counted(op, args, with_gradient):
    given = leaves(op, args)

    def run():
        results = as_tuple(op(*given))
        sum(r.sum() for r in results[: len(results) - op.non_differentiable]).backward()

    forward = op.cost(*op.complete(args)).flops
    total = sum(flops(run).values())
    # The gradient of a loss a row is made when its upstream gradient is known.
    in_forward = op.gradient_in_forward and "none" not in args
    assert total == forward if in_forward else total > 1.5 * forward


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
def test_flops_of_fake_tensors_are_counted(op, args, with_gradient):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given = tuple(fake.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in copies(args))

    def run():
        with fake:
            op(*given)

    assert sum(flops(run).values()) > 0


def test_every_op_has_a_cost():
    assert all(op.cost for op in OPS.values())


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "llama_fast.ops"])
def test_formulas_are_there_in_whatever_order_of_imports(first):
    """And importing the package does not import torch's counter, which imports Triton."""
    second = {"torch.utils.flop_counter": "llama_fast.ops"}.get(first, "torch.utils.flop_counter")
    program = f"""
import sys, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} == "torch.utils.flop_counter")
import {second}, torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert torch.ops.llama_fast.rms_norm in flop_registry
assert torch.ops.llama_fast.attention_backward in flop_registry
assert torch.ops.aten.mm in flop_registry
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("op", "args", "with_gradient"), SMALL)
@pytest.mark.parametrize("mode", MODES)
def test_the_profiler_shows_names(op, args, with_gradient, mode):
    with MODES[mode]():
        op(*copies(args))  # its plan is known
        with profile(activities=[ProfilerActivity.CPU]) as found:
            inside = op(*copies(args))
        outside = op(*copies(args))
    assert [e.count for e in found.key_averages() if e.key == f"llama_fast::{op.name}"] == [1]
    for a, e in zip(used(op, inside), used(op, outside), strict=True):
        assert torch.equal(a, e)


def test_the_profiler_sees_what_is_public():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        llama_fast.swiglu(llama_fast.rms_norm(x, weight), x)
    names = {event.key for event in found.key_averages()}
    assert {"llama_fast::rms_norm", "llama_fast::swiglu"} <= names
