"""`llama_fast.trace` of transformers models, patched and not."""

from __future__ import annotations

import pytest
import torch

import llama_fast
import llama_fast.inspect.page

from . import hf_models
from .test_inspect import MODES, hooks, launches

pytest.importorskip("transformers")

NAMES = {
    "attention.norm", "attention.q", "attention.k", "attention.v", "attention.q_rotated",
    "attention.keys", "attention.values", "attention.scores", "attention.masked_scores",
    "attention.weights", "attention.heads", "attention.output", "input", "mlp.input", "mlp.norm",
    "mlp.gate", "mlp.up", "mlp.hidden", "mlp.output",
}  # fmt: skip


@pytest.mark.parametrize("family", hf_models.FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_patched_beside_not(family, mode):
    model, ids = hf_models.model(family), hf_models.tokens(1, 17)
    with MODES[mode]():
        plain = llama_fast.trace(model, ids)
        assert {call.backend for call in plain.calls} == {"torch"}
        expected = model(ids).logits
        assert torch.equal(plain["logits"], expected)
        with llama_fast.patch(model):
            with launches() as unwatched:
                model(ids)
            patched = llama_fast.trace(model, ids)
            assert torch.equal(patched["logits"], model(ids).logits)
    called = [(call.op, call.backend) for call in patched.calls if call.backend != "torch"]
    assert called == unwatched  # a hook where a kernel skips a module would change these
    assert any(op == "add_rms_norm" for op, _ in called)
    for trace in (plain, patched):
        for layer in range(2):
            assert {n.split(".", 2)[2] for n in trace if n.startswith(f"layers.{layer}.")} == NAMES
            assert trace.attention_error(layer) < 1e-5
        assert not any(trace[name].requires_grad for name in trace)
    comparison = patched.compare(plain)
    assert len(comparison.steps) == len(plain) == len(patched)
    assert comparison.first is None, str(comparison)
    assert hooks(model) == 0


def test_padding_and_a_cache_of_transformers():
    from transformers import DynamicCache

    model, ids = hf_models.model(), hf_models.tokens(1, 17)
    whole = llama_fast.trace(model, ids)
    with llama_fast.patch(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :9], past_key_values=cache)
        trace = llama_fast.trace(model, ids[:, 9:], cache=cache)
    scores = "layers.1.attention.masked_scores"
    assert trace[scores].shape == (1, 4, 8, 17)
    torch.testing.assert_close(trace[scores], whole[scores][:, :, 9:], rtol=1e-4, atol=1e-4)


class Words:
    """A tokenizer as transformers has them."""

    def __call__(self, text):
        return {"input_ids": [1, *map(len, text.split())]}

    def decode(self, ids):
        return "".join("x" * i for i in ids)


def test_a_text_and_a_tokenizer_of_transformers():
    trace = llama_fast.trace(hf_models.model(), "some words", Words(), layers=0)
    assert trace.tokens.tolist() == [[1, 4, 5]] and trace.pieces == ["x", "xxxx", "xxxxx"]
    assert trace.next_tokens(1)[0].piece == "x" * int(trace["logits"][0, -1].argmax())


def test_attention_that_is_not_seen_is_left_out():
    """transformers' eager attention makes no call that could be watched."""
    model = hf_models.model(attn_implementation="eager")
    trace = llama_fast.trace(model, hf_models.tokens(1, 5))
    assert "layers.0.attention.output" in trace and "layers.0.attention.scores" not in trace
    with pytest.raises(llama_fast.errors.LlamaFastError, match="SDPA"):
        llama_fast.inspect.page.page(trace)


def test_the_layer_that_differs_is_found_beside_a_patch():
    model, ids = hf_models.model(), hf_models.tokens(1, 17)
    plain = llama_fast.trace(model, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] += 1
    with llama_fast.patch(model):
        assert llama_fast.trace(model, ids).compare(plain).first.name == "layers.1.mlp.up"
