"""axolotl's plugin manager, given the name of our plugin, has a model patched."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("axolotl", reason="needs axolotl: pip install axolotl")
pytest.importorskip("peft", reason="needs peft: pip install peft")

import peft
from axolotl.integrations.base import PluginManager

from llama_fast.dispatch import record_decisions

from .hf_models import model, tokens


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_is_patched(adapter, caplog):
    net, ids = model(), tokens()
    if adapter:
        net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    own = net(ids, labels=ids).loss
    manager = PluginManager.get_instance()
    manager.register("llama_fast.engines.axolotl.LlamaFastPlugin")
    with caplog.at_level(logging.INFO):
        manager.post_model_load({}, net)
    assert "rms_norm" in caplog.text
    with record_decisions() as decisions:
        loss = net.train()(ids, labels=ids).loss
        loss.backward()
    called = {decision.op for decision in decisions}
    assert {"rms_norm", "rope", "attention", "swiglu", "linear_cross_entropy"} <= called
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)
