"""The layers for `kernelize` keep to its contract, and compute what the models' own do."""

from __future__ import annotations

import inspect
from collections import Counter
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.integrations import hub_kernels
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.utils.import_utils import is_kernels_available

from llama_fast.dispatch import record_decisions
from llama_fast.hf import layers
from tests.hf_models import model, tokens

REPLACED = {"RMSNorm": LlamaRMSNorm, "SwiGLUMLP": LlamaMLP}


@pytest.mark.parametrize("name", REPLACED)
def test_is_stateless_and_takes_the_same_arguments(name):
    layer = layers.LAYERS[name]
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
@pytest.mark.parametrize("name", REPLACED)
def test_its_forward_serves_the_modules_of_a_model(name, dtype):
    net, ids = model().to(dtype), tokens()
    own = net(ids).logits
    for module in net.modules():
        if type(module) is REPLACED[name]:
            module.forward = MethodType(layers.LAYERS[name].forward, module)
    torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads_at", "rows"), [(1, 3), (1, 1), (2, 3)])
def test_rotation_is_that_of_the_models(heads_at, rows, dtype):
    q, k = (torch.randn(3, 5, heads, 8, dtype=dtype) for heads in (4, 2))
    if heads_at == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angle = torch.randn(rows, 5, 4).repeat(1, 1, 2)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    found = layers.Rotation()(q, k, *tables, heads_at)
    own = modeling_llama.apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=heads_at)
    torch.testing.assert_close(found, own)


def test_an_mlp_keeps_its_activation():
    mlp, x = model().model.layers[0].mlp, torch.randn(3, 64)
    mlp.act_fn = nn.GELU()
    assert torch.equal(layers.SwiGLUMLP.forward(mlp, x), mlp(x))


@pytest.fixture
def kernels(monkeypatch):
    """The package, with what it and transformers remember of layers as it was before."""
    if not is_kernels_available() or not hasattr(hub_kernels, "_KERNEL_MAPPING_CACHE"):
        pytest.skip("needs transformers[kernels], from 5.16 on with the version it asks for")
    import kernels as package

    monkeypatch.setattr(hub_kernels, "_KERNEL_MAPPING_CACHE", None)
    with package.use_kernel_mapping({}, inherit_mapping=False):
        yield package
    for mlp in (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP):
        if "kernel_layer_name" in vars(mlp):
            del mlp.kernel_layer_name
    vars(modeling_llama.apply_rotary_pos_emb).pop("forward", None)


def test_use_kernels_takes_them(kernels, tmp_path):
    net, ids = model(), tokens()
    own = net(ids, labels=ids)
    own.loss.backward()
    net.save_pretrained(tmp_path)
    layers.register()
    taken = type(net).from_pretrained(tmp_path, use_kernels=True)
    assert taken.model.norm.forward.__func__ is layers.RMSNorm.forward
    assert taken.model.layers[0].mlp.forward.__func__ is layers.SwiGLUMLP.forward
    with record_decisions() as decisions:
        found = taken(ids, labels=ids)
    calls = Counter(decision.op for decision in decisions)
    layers_of = len(net.model.layers)
    expected = {"rms_norm": 2 * layers_of + 1, "rope": layers_of, "swiglu": layers_of}
    assert expected.items() <= calls.items()
    torch.testing.assert_close(found.logits, own.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    for ours, theirs in zip(taken.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_register_comes_before_what_transformers_has_for_a_gpu(kernels):
    layers.register()
    hub_kernels.register_kernel_mapping_transformers()
    known = hub_kernels.get_kernel_mapping_transformers()
    for name in layers.LAYERS:
        assert known[name]["cuda"] == known[name]["cpu"] == layers.Repository(name)
    assert "SiLU" in known  # theirs stay
