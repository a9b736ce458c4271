"""Loading, generating, streaming, training and patching in each of torch's modes: what is made in
one is of use in the others, and the results are the same."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from itertools import product

import pytest
import torch

import llama_fast
from llama_fast.cli.options import DEMO
from llama_fast.generation.generate import generate, stream
from llama_fast.tokenizer import Tokenizer

from . import hf_models

MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
EACH = pytest.mark.parametrize("mode", MODES)
PAIRS = pytest.mark.parametrize(("made_in", "used_in"), list(product(MODES, MODES)))
FORMS = pytest.mark.parametrize("quantize", [None, "int8"])
TOKENS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DEMO)


def load(quantize=None, dtype=None):
    return llama_fast.Llama.from_pretrained(DEMO, device="cpu", quantize=quantize, dtype=dtype)


def texts(model, tokenizer, **more) -> list[list[int]]:
    prompts = ["Once upon a time", "A dog"]
    made = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0, **more)
    return [completion.tokens for completion in made]


def train(model) -> torch.Tensor:
    """The gradient of a norm's weight, which every other weight has a part in."""
    model.zero_grad()
    model.loss(TOKENS, TOKENS).backward()
    return model.layers[0].attention_norm.weight.grad.clone()


@EACH
@FORMS
def test_loaded_in_a_mode_and_trained_outside(mode, quantize, tokenizer):
    expected = train(load(quantize))
    with MODES[mode]():
        model = load(quantize)
        texts(model, tokenizer)
    assert not any(x.is_inference() for x in [*model.parameters(), *model.buffers()])
    assert torch.equal(train(model), expected)
    with torch.no_grad():
        model.layers[0].attention_norm.weight.add_(1)


@EACH
def test_made_in_a_mode_and_trained_outside(mode):
    config = load().config
    with MODES[mode]():
        model = llama_fast.Llama(config)
        weight = torch.ones(config.dim)
        model.set_weight("norm.weight", weight)
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert torch.isfinite(train(model)).all()


@EACH
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_generation(mode, quantize, dtype, kv_cache, tokenizer):
    model = load(quantize, dtype)
    expected = texts(model, tokenizer, kv_cache=kv_cache)
    with MODES[mode]():
        assert texts(model, tokenizer, kv_cache=kv_cache) == expected
    assert texts(model, tokenizer, kv_cache=kv_cache) == expected


@PAIRS
def test_a_stream_that_begins_in_one_mode_and_ends_in_another(made_in, used_in, tokenizer):
    model = load()
    more = {"max_new_tokens": 8, "temperature": 0.7, "seed": 3}
    expected = [chunk.token for chunk in stream(model, tokenizer, "Once", **more)]
    with MODES[made_in]():
        chunks = stream(model, tokenizer, "Once", **more)
        found = [next(chunks).token for _ in range(3)]
    with MODES[used_in]():
        found += [next(chunks).token for _ in range(2)]
    assert found + [chunk.token for chunk in chunks] == expected


@PAIRS
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_cache_made_in_one_mode_and_used_in_another(made_in, used_in, kv_cache):
    model = load()
    with torch.no_grad():
        expected = model(TOKENS, cache=model.new_cache(1, 32, kv_cache))[:, 10:]
    with MODES[made_in]():
        cache = model.new_cache(1, 32, kv_cache)
        model(TOKENS[:, :10], cache=cache)
    with MODES[used_in]():
        found = model(TOKENS[:, 10:], cache=cache)
        assert torch.isfinite(found).all()
    torch.testing.assert_close(found.clone(), expected, rtol=0.05, atol=0.2)
    cache.reset()
    assert cache.lengths.tolist() == [0]


@EACH
def test_checkpoints_read_in_a_mode(mode):
    with MODES[mode]():
        read = dict(llama_fast.checkpoint.open_checkpoint(DEMO).tensors())
    assert not any(x.is_inference() for x in read.values())


@EACH
def test_patched_in_a_mode_and_used_in_all(mode):
    model, ids = hf_models.model(), hf_models.tokens()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with MODES[mode]():
        patch = llama_fast.patch(model, strict=True)
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
    with patch:
        for used_in in MODES.values():
            with used_in():
                assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), made)
        model(ids, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
def test_compiled_in_all_modes(tokenizer):
    torch._dynamo.reset()
    model = load()
    expected, gradient = texts(model, tokenizer), train(model)
    model.compile()
    for mode in MODES.values():
        with mode():
            assert texts(model, tokenizer) == expected
    torch.testing.assert_close(train(model), gradient, rtol=0.05, atol=0.01)
