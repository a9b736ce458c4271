"""What people do with transformers models keeps working on patched ones."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import llama_fast
from llama_fast.errors import PatchError
from llama_fast.hf.patched import function_of, is_patched
from tests.hf_models import config, left_padded, model, tokens
from tests.test_hf import gradients, state


def assert_same_gradients(given: dict, own: dict) -> None:
    assert given.keys() == own.keys()
    for name in own:
        assert (given[name] - own[name]).abs().max() <= 2e-5 * own[name].abs().max(), name


class TestGenerate:
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_caches(self, cache, padded):
        net, inputs = model(), {"input_ids": tokens()}
        if padded:
            inputs = left_padded(tokens())
        options = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": cache}
        own = net.generate(**inputs, **options)
        with llama_fast.patch(net):
            assert torch.equal(net.generate(**inputs, **options), own)

    def test_beam_search(self):
        net, inputs = model(), left_padded(tokens())
        options = {"max_new_tokens": 25, "num_beams": 4, "do_sample": False}
        own = net.generate(**inputs, **options)
        with llama_fast.patch(net):
            assert torch.equal(net.generate(**inputs, **options), own)

    def test_sampling(self):
        net, inputs = model(), left_padded(tokens())
        torch.manual_seed(3)
        own = net.generate(**inputs, max_new_tokens=25, do_sample=True, top_k=20)
        with llama_fast.patch(net):
            torch.manual_seed(3)
            given = net.generate(**inputs, max_new_tokens=25, do_sample=True, top_k=20)
        assert torch.equal(given, own)

    def test_a_cache_filled_in_chunks(self):
        net, ids = model(), tokens()
        own = net(ids).logits
        with llama_fast.patch(net), torch.no_grad():
            cache, parts = transformers.DynamicCache(), []
            for chunk in ids.split((9, 7, 1, 4), dim=1):
                parts.append(net(chunk, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), own, rtol=1e-5, atol=1e-5)

    def test_left_padding_is_served_by_the_op(self, monkeypatch):
        net, calls = model(), []
        patch = llama_fast.patch(net)
        sdpa = nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: calls.append(1) or sdpa(*args, **kwargs),
        )
        for cache in ("dynamic", "static"):
            options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
            net.generate(**left_padded(tokens()), **options)
        assert not calls
        patch.remove()
        net.generate(**left_padded(tokens()), max_new_tokens=5, do_sample=False)
        assert calls


class TestCompile:
    def test_whole_graph(self):
        net, ids = model(), tokens()
        with torch.no_grad(), llama_fast.patch(net):
            own = net(ids).logits
            torch._dynamo.reset()
            compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(ids).logits, own, rtol=1e-5, atol=1e-5)

    def test_patch_and_removal_are_seen(self):
        """A model compiled before the patch runs patched after it, and unpatched after removal."""
        net, ids = model(), tokens()
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="aot_eager")
        with torch.no_grad():
            own = compiled(ids).logits
            with llama_fast.patch(net):
                given = compiled(ids).logits
            assert not torch.equal(given, own)
            torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)
            assert torch.equal(compiled(ids).logits, own)


class TestTraining:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        net, ids, runs = model(), tokens(), []
        _, own = gradients(net, ids)
        for layer in net.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with llama_fast.patch(net):
            assert_same_gradients(gradients(net, ids)[1], own)
        assert len(runs) == 2 * len(net.model.layers)  # each layer once more in the backward pass

    def test_attentions_asked_for_by_the_config(self):
        net, ids = model(attn_implementation="eager"), tokens()
        net.config.output_attentions = True
        own = net(ids).attentions
        with llama_fast.patch(net):
            given = net(ids).attentions
        assert len(given) == len(own) == len(net.model.layers)
        for a, b in zip(given, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_a_model_in_the_making(self):
        """Patched under another default device, as from_pretrained makes models."""
        with torch.device("meta"):
            net = transformers.LlamaForCausalLM(config())
            patch = llama_fast.patch(net)
        assert {row.op for row in patch.report.rows if row.reason is None} >= {"rope", "rms_norm"}

    def test_autocast(self):
        net, ids = model(), tokens()
        with torch.autocast("cpu", torch.bfloat16):
            own_loss, own = gradients(net, ids)
            with llama_fast.patch(net):
                loss, given = gradients(net, ids)
        torch.testing.assert_close(loss, own_loss, rtol=1e-2, atol=1e-2)
        for name in own:
            assert (given[name] - own[name]).norm() <= 0.05 * own[name].norm(), name

    def test_hooks_see_their_modules(self):
        net, ids, seen = model(), tokens(), []
        watched = ("post_attention_layernorm", "down_proj", "self_attn", "lm_head", "mlp")
        for name, module in net.named_modules():
            if name.endswith(watched):
                module.register_forward_hook(lambda *_, name=name: seen.append(name))
        gradients(net, ids)
        own, seen[:] = list(seen), []
        with llama_fast.patch(net):
            gradients(net, ids)
        assert seen == own

    def test_a_step_of_an_optimizer(self):
        own, ids = model().train(), tokens()
        net = copy.deepcopy(own)
        llama_fast.patch(net)
        for each in (own, net):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                each(ids, labels=ids).loss.backward()
                optimizer.step()
        for (name, given), expected in zip(net.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5, msg=name)


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip(
            "peft", reason="needs peft: pip install peft", exc_type=ImportError
        )

    def adapted(self, peft, net):
        torch.manual_seed(5)
        settings = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj", "gate_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(net, settings).eval()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_lora(self, peft, when):
        net, ids = model(), tokens()
        reference = self.adapted(peft, copy.deepcopy(net))
        reference.train()
        reference(input_ids=ids, labels=ids).loss.backward()
        own = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        reference.eval()
        assert own
        if when == "before":
            adapted = self.adapted(peft, net)
            patch = llama_fast.patch(adapted)
        else:
            patch = llama_fast.patch(net)
            adapted = self.adapted(peft, net)
        with torch.no_grad():
            expected = reference(input_ids=ids).logits
            given = adapted(input_ids=ids).logits
        assert not torch.equal(given, expected)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
        adapted.train()
        adapted(input_ids=ids, labels=ids).loss.backward()
        trained = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
        assert_same_gradients(trained, own)
        adapted.eval()
        patch.remove()
        assert torch.equal(adapted(input_ids=ids).logits, expected)

    def test_merged_adapters(self, peft):
        net, ids = model(), tokens()
        llama_fast.patch(net)
        adapted = self.adapted(peft, net)
        with torch.no_grad():
            expected = adapted(input_ids=ids).logits
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs a torch with torch.distributed and gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestDistributed:
    def test_ddp(self, group):
        net, ids = model(), tokens()
        _, own = gradients(net, ids)
        net.zero_grad()
        with llama_fast.patch(net):
            wrapped = DistributedDataParallel(net.train())
            wrapped(input_ids=ids, labels=ids).loss.backward()
            assert_same_gradients({n: p.grad for n, p in net.named_parameters()}, own)
        del wrapped

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_fully_shard(self, group, when):
        from torch.distributed.fsdp import fully_shard

        net, ids = model(tie_word_embeddings=False), tokens()
        _, own = gradients(net, ids)
        net.zero_grad()
        if when == "after":
            patch = llama_fast.patch(net)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in net.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        if when == "before":
            patch = llama_fast.patch(net)
        assert not patch.report.left_alone
        net.train()
        net(input_ids=ids, labels=ids).loss.backward()
        given = {n: p.grad.full_tensor() for n, p in net.named_parameters()}
        assert_same_gradients(given, own)
        patch.remove()
        assert not any(map(is_patched, net.modules()))


class TestManyModels:
    def test_shared_layers_of_two_heads(self):
        """A classifier over the body of a language model: one patch serves the body once."""
        net, ids = model(), tokens()
        other = transformers.LlamaForSequenceClassification(config(num_labels=3)).eval()
        other.model = net.model
        own, scores = net(ids).logits, other(ids).logits
        before = state(other)
        with llama_fast.patch(net):
            torch.testing.assert_close(other(ids).logits, scores, rtol=1e-5, atol=1e-5)
            with pytest.raises(PatchError, match="patched already"):
                llama_fast.patch(other)
        assert state(other) == before
        assert torch.equal(net(ids).logits, own)

    def test_hidden_states_and_tuples(self):
        net, ids = model(), tokens()
        own = net(ids, output_hidden_states=True, return_dict=False)
        with llama_fast.patch(net):
            given = net(ids, output_hidden_states=True, return_dict=False)
        assert len(given) == len(own)
        torch.testing.assert_close(given[-1], own[-1], rtol=1e-5, atol=1e-5)
        assert function_of(net.model.norm) is None
