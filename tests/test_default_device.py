"""`torch.set_default_device` and `with torch.device(…)`, which loaders of models use, change no
result: nothing of this package's own is made on a device that is not said."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import llama_fast
from llama_fast.bench import roofline
from llama_fast.checkpoint import write_random
from llama_fast.cli.options import DEMO
from llama_fast.dispatch import OPS
from llama_fast.generation.generate import generate
from llama_fast.tokenizer import Tokenizer
from llama_fast.training.blocks import PackedDataset

from . import hf_models
from .checkpoints import SMALL
from .ops.backends import BACKENDS, CUDA_HOST, name_of, on
from .ops.oracle import as_tuple, copies
from .ops.test_library import FORMS, leaves

# A kernel of the host's CUDA is compiled for minutes, and takes what the other kernels take.
HERE = [b for b in BACKENDS if name_of(b) not in ("cuda", CUDA_HOST)]


@contextmanager
def set_to(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def under_each(call):
    """Asserts that call() gives the same tensors, under no default device and under another."""
    expected = call()
    for default in (torch.device("meta"), set_to("meta")):
        with default:
            found = call()
        for a, b in zip(expected, found, strict=True):
            assert a.device.type == b.device.type == "cpu" and torch.equal(a, b)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("form", FORMS)
def test_ops(form, backend):
    op, args, with_gradient = FORMS[form]

    def call():
        for each in OPS.values():
            each.forget_order()  # so that this is the first call of its shapes
        with on(name_of(backend)):
            given = copies(args)
            with torch.no_grad():
                results = as_tuple(op(*given))
        asked = leaves(op, args) if with_gradient else args
        if with_gradient:  # of which a backend may have none of its own
            sum(y.sum() for y in as_tuple(op(*asked))).backward()
        grads = [t.grad for t in asked if isinstance(t, torch.Tensor) and t.grad is not None]
        return [t for t in (*args, *results, *given, *grads) if isinstance(t, torch.Tensor)]

    under_each(call)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_model(quantize, tmp_path):
    saved = iter(range(9))

    def call():
        model = llama_fast.Llama.from_pretrained(DEMO, device="cpu", quantize=quantize)
        folder = tmp_path / str(next(saved))
        model.save_pretrained(folder)
        again = llama_fast.Llama.from_pretrained(folder, device="cpu")
        tokens = torch.arange(1, 20, device="cpu")[None]
        with torch.no_grad():
            caches = [model.new_cache(1, 32, kind) for kind in (None, "int8")]
            return [model(tokens), again(tokens), *(model(tokens, cache=c) for c in caches)]

    under_each(call)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generation(temperature):
    tokenizer = Tokenizer.from_pretrained(DEMO)

    def call():
        model = llama_fast.Llama.from_pretrained(DEMO, device="cpu")
        made = generate(
            model,
            tokenizer,
            ["Once", "A dog ran"],
            max_new_tokens=8,
            temperature=temperature,
            seed=1,
        )
        return [torch.tensor(m.tokens, device="cpu") for m in made]

    under_each(call)


def test_training():
    blocks = PackedDataset(torch.arange(100, dtype=torch.int32) % 50, 16)

    def call():
        model = llama_fast.Llama.from_pretrained(DEMO, device="cpu")
        tokens, targets = blocks.rows(blocks.order(0, 0)[:2])
        loss = model.loss(tokens, targets)
        loss.backward()
        return [tokens, targets, loss.detach(), *(p.grad for p in model.parameters())]

    under_each(call)


def test_random_checkpoints(tmp_path):
    made = iter(range(9))

    def call():
        folder = tmp_path / str(next(made))
        write_random(folder, replace(SMALL, vocab_size=1024), seed=0)
        return [*llama_fast.Llama.from_pretrained(folder, device="cpu").parameters()]

    under_each(call)


def test_patching():
    model, ids = hf_models.model(), hf_models.tokens()

    def call():
        with llama_fast.patch(model, strict=True), torch.no_grad():
            return [model(ids).logits]

    under_each(call)


def test_roofline():
    under_each(lambda: [roofline._sink(2), roofline._memory(4096)])
