"""Overrides of torchtitan's components: a model computes what it computes without, by our ops."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

pytest.importorskip("torchtitan", reason="needs torchtitan 0.3: pip install torchtitan")

from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.llama3 import model_registry

import llama_fast.engines.torch_attention  # noqa: F401  torch has no varlen_attn on CPUs
from llama_fast.dispatch import record_decisions
from llama_fast.engines import torchtitan as ours

OVERRIDES = [f"{ours.__name__}.{name}" for name in ("rms_norm", "swiglu", "rope")]


@pytest.fixture(scope="module")
def pair():
    """torchtitan's small model twice, of the same weights, the second time with our ops."""
    spec = model_registry("debugmodel", attn_backend="varlen")
    del spec.model.layers[2:]
    own = copy.deepcopy(spec.model).build()
    apply_overrides(OverrideConfig(imports=OVERRIDES), spec)
    taken = spec.model.build()
    torch.manual_seed(0)
    own.init_states()
    for name, parameter in own.named_parameters():
        if "norm" in name:  # norms of ones would hide a wrong weight
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    taken.load_state_dict(own.state_dict())
    return own, taken


def test_a_model_takes_them(pair):
    tokens = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(25), torch.arange(15))).expand(2, -1)  # two documents a row
    torch.nn.attention.activate_flash_attention_impl("llama_fast")
    results = []
    try:
        for model in pair:
            with record_decisions() as decisions:
                logits = model(tokens, positions, model.get_attention_masks(positions))
                logits.float().square().mean().backward()
            results.append((logits, Counter(decision.op for decision in decisions)))
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    (own, before), (taken, calls) = results
    assert before.keys() <= {"attention", "attention_backward"}
    assert {"rms_norm": 5, "rope": 4, "swiglu": 2, "rms_norm_backward": 5}.items() <= calls.items()
    # Their attention rounds to bfloat16, which makes a small difference a larger one.
    assert (taken - own).norm() < 1e-3 * own.norm()
    for x, y in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        assert (x.grad - y.grad).norm() < 1e-3 * y.grad.norm()
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["attention_norm", "feed_forward"])
def test_a_part_is_the_same_function(pair, part, dtype):
    own, taken = (model.layers["0"].get_submodule(part) for model in pair)
    results = []
    for module in (own, taken):
        x = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        module, x = copy.deepcopy(module).to(dtype), x.requires_grad_()
        y = module(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(weight.grad for weight in module.parameters())])
    within = 1e-5 if dtype is torch.float32 else 2e-2
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=within, atol=within * y.abs().max().item())


def test_a_norm_of_another_dtype_is_torchs(pair):
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    with record_decisions() as decisions:
        assert torch.equal(*(model.norm(x) for model in pair))
    assert not decisions


@pytest.mark.parametrize("positions", [None, "one row", "a row each"])
def test_rotation_is_the_same_function(pair, positions):
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    rows = {None: None, "one row": torch.arange(3, 10)[None],
            "a row each": torch.stack((torch.arange(7), torch.arange(9, 2, -1)))}  # fmt: skip
    own, taken = (model.layers["0"].attention.rope(q, k, rows[positions]) for model in pair)
    torch.testing.assert_close(taken, own, rtol=1e-5, atol=1e-5)
