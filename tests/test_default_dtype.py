"""`torch.set_default_dtype`, which loaders of models use, changes no result: nothing of this
package's own is made in a dtype that is not said."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import llama_fast
from llama_fast.bench import roofline
from llama_fast.cli.options import DEMO
from llama_fast.dispatch import OPS

from . import hf_models
from .ops.oracle import as_tuple, copies

DEFAULTS = (torch.float32, torch.bfloat16, torch.float64)


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def under_each(call):
    """Asserts that call() gives the same tensors, and returns them."""
    found = []
    for dtype in DEFAULTS:
        with default(dtype):
            found.append(call())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    return found[0]


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.cases is not None])
@pytest.mark.parametrize("strict", [True, False], ids=["eager", "chosen"])
def test_ops(name, strict):
    op = OPS[name]
    case = op.cases()[0]

    def call():
        args = case.make(torch.Generator().manual_seed(0), case.dtypes[-1], "cpu")
        given = copies(args)
        results = as_tuple(op.eager(*given) if strict else op(*given))
        # An op that writes shows it in its arguments.
        return [t for t in (*args, *results, *given) if isinstance(t, torch.Tensor)]

    under_each(call)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_model(quantize):
    def call():
        model = llama_fast.Llama.from_pretrained(DEMO, device="cpu", quantize=quantize)
        tokens = torch.arange(1, 20)[None]
        with torch.no_grad():
            caches = [model.new_cache(1, 32, kind) for kind in (None, "int8")]
            return [model(tokens), *(model(tokens, cache=cache) for cache in caches)]

    under_each(call)


def test_a_training_step():
    def call():
        model = llama_fast.Llama.from_pretrained(DEMO, device="cpu")
        tokens = torch.arange(1, 20)[None]
        loss = model.loss(tokens, tokens)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    under_each(call)


def test_patching():
    """What a forward computes is tried out: not in the default dtype, nor in autocast's."""
    model = hf_models.model().to(torch.bfloat16)
    for dtype in DEFAULTS:
        with default(dtype), llama_fast.patch(model, strict=True):
            pass
    with torch.autocast("cpu", torch.bfloat16), llama_fast.patch(model, strict=True):
        pass


def test_roofline(monkeypatch):
    """The kernels write a float for each thread."""
    with default(torch.float16):
        assert roofline._sink(2).nbytes == 8
