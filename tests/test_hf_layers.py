"""The layers for `kernelize` keep to its contract, and compute what the models' own do."""

from __future__ import annotations

import inspect
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llama_fast.hf import layers
from tests.hf_models import model, tokens

LAYERS = {"RMSNorm": layers.RMSNorm, "SwiGLUMLP": layers.SwiGLUMLP}
REPLACED = {"RMSNorm": LlamaRMSNorm, "SwiGLUMLP": LlamaMLP}


@pytest.mark.parametrize("name", LAYERS)
def test_is_stateless_and_takes_the_same_arguments(name):
    layer = LAYERS[name]
    more = {key for key, _ in inspect.getmembers(layer)} - dict(
        inspect.getmembers(nn.Module)
    ).keys()
    assert more == {"can_torch_compile", "has_backward"}
    assert layer.__init__ is nn.Module.__init__
    own, theirs = (
        [p.kind for p in inspect.signature(inspect.unwrap(c.forward)).parameters.values()]
        for c in (layer, REPLACED[name])
    )
    assert own == theirs
    assert layers.Repository(name).load() is layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_its_forward_serves_the_modules_of_a_model(name, dtype):
    net, ids = model().to(dtype), tokens()
    own = net(ids).logits
    for module in net.modules():
        if type(module) is REPLACED[name]:
            module.forward = MethodType(LAYERS[name].forward, module)
    torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)


def test_kernelize_takes_them():
    kernels = pytest.importorskip("kernels", reason="needs kernels: pip install kernels")
    net, ids = model(), tokens()
    own = net(ids).logits
    norm = type("Norm", (LlamaRMSNorm,), {})  # the decorator would change transformers' own class
    kernels.replace_kernel_forward_from_hub(norm, "RMSNorm")
    net.model.norm.__class__ = norm
    mapping = {"RMSNorm": {"cpu": layers.Repository("RMSNorm")}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        net = kernels.kernelize(net, mode=kernels.Mode.INFERENCE, device="cpu")
    assert net.model.norm.forward.__func__ is layers.RMSNorm.forward
    torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)
