"""Patched models under torch's tools: second gradients, torch.jit, FLOPs, the profiler."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import llama_fast
from tests.hf_models import model, tokens


class Logits(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.net(ids, use_cache=False).logits


def patched() -> torch.nn.Module:
    net = model()
    llama_fast.patch(net)
    return net


@pytest.mark.parametrize("labels", [False, True])
def test_a_hessian_vector_product(labels):
    """With labels the head and its loss are one op."""
    found = []
    for net in (model(), patched()):
        net.train()
        ids = tokens()
        with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second gradient
            out = net(ids, labels=ids if labels else None, use_cache=False)
        loss = out.loss if labels else out.logits.square().mean()
        parameters = [p for p in net.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        g = torch.Generator().manual_seed(0)
        product = sum((f * torch.randn(f.shape, generator=g)).sum() for f in first)
        found.append(torch.autograd.grad(product, parameters))
    for own, ours in zip(*found, strict=True):
        scale = float(own.abs().max())
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_jit_trace(mode):
    """Saved and loaded too, with the numbers of the unpatched model."""
    ids = tokens()
    own = Logits(model())(ids).detach()
    with mode():
        traced = torch.jit.trace(Logits(patched()).eval(), ids, check_trace=False)
        names = str(traced.inlined_graph)
        assert {"rms_norm", "linear", "swiglu"} <= set(re.findall(r"llama_fast::(\w+)", names))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for function in (traced, torch.jit.load(file)):
            for _ in range(3):
                torch.testing.assert_close(function(ids).detach(), own, rtol=1e-4, atol=1e-4)


def test_flops_and_names():
    from torch.utils.flop_counter import FlopCounterMode

    ids, found = tokens(), []
    for net in (model(), patched()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(ids, use_cache=False)
        found.append(counter.get_total_flops())
    own, ours = found
    assert 0.9 * own < ours < 1.5 * own  # ours counts norms and activations too
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        net(ids, use_cache=False)
    names = {event.key for event in seen.key_averages()}
    assert {"llama_fast::rms_norm", "llama_fast::attention", "llama_fast::linear"} <= names
