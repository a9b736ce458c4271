"""Patched models whose `scaling` and `variance_epsilon` are tensors: read in every call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llama_fast
from tests.hf_models import model, tokens


def with_tensors(net, scaling: float, eps: float) -> list[torch.Tensor]:
    """Gives them to all modules that have such a number, and returns them."""
    made = []
    for module in net.modules():
        for name, value in (("scaling", scaling), ("variance_epsilon", eps)):
            if isinstance(getattr(module, name, None), float | torch.Tensor):
                setattr(module, name, torch.tensor(value))
                made.append(getattr(module, name))
    return made


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_tensor_is_read_in_every_call(attention, mode):
    own = model(attn_implementation=attention)
    patched = model(attn_implementation=attention)
    llama_fast.patch(patched)
    for scaling, eps in ((0.25, 1e-5), (0.9, 0.7), (0.1, 1e-3)):
        for net in (own, patched):
            assert len(with_tensors(net, scaling, eps)) == 2 + 5  # attentions and norms
        with torch.no_grad():
            expected = own(tokens()).logits
        with mode():
            found = patched(tokens()).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_that_learns_has_its_gradient():
    gradients = []
    for patched in (False, True):
        net = model().train()
        if patched:
            llama_fast.patch(net)
        eps = nn.Parameter(torch.tensor(0.1))
        for block in net.model.layers:
            del block.post_attention_layernorm.variance_epsilon
            block.post_attention_layernorm.variance_epsilon = eps
        net(tokens()).logits.square().mean().backward()
        gradients.append(eps.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
