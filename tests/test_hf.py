"""Patched transformers models against themselves: parity, exact undo, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import llama_fast
from llama_fast.errors import LlamaFastError, PatchError
from llama_fast.hf import Patch, forwards
from llama_fast.hf.handle import OPS
from llama_fast.hf.logits import DeferredLogits
from llama_fast.hf.patched import function_of, is_patched, patch_class, unpatch_class
from tests.hf_models import FAMILIES, config, left_padded, model, tokens


def state(net: nn.Module) -> list[tuple]:
    """Everything that a patch could touch, by identity."""
    return [
        (name, key, id(value), id(type(module)))
        for name, module in net.named_modules()
        for key, value in vars(module).items()
    ]


def gradients(net: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    net.train()
    loss = net(ids, labels=ids).loss
    loss.backward()
    net.eval()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
class TestParity:
    def test_float32_logits(self, family):
        net, ids = model(family), tokens()
        padded = left_padded(ids)
        kept = padded["attention_mask"].bool()
        with torch.no_grad():
            own, own_padded = net(ids).logits, net(**padded).logits
            with llama_fast.patch(net) as patch:
                assert not [r for r in patch.report.left_alone if "bias" not in r.reason]
                given, given_padded = net(ids).logits, net(**padded).logits
        assert not torch.equal(given, own), "the patched model took the same path"
        torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given_padded[kept], own_padded[kept], rtol=1e-5, atol=1e-5)

    def test_bfloat16_error_is_at_most_twice_its_own(self, family):
        net, ids = model(family), tokens(4, 40)
        with torch.no_grad():
            exact = net.double()(ids).logits
            net.to(torch.bfloat16)
            own = (net(ids).logits.double() - exact).square().mean().sqrt()
            with llama_fast.patch(net):
                given = (net(ids).logits.double() - exact).square().mean().sqrt()
        assert given <= 2 * own

    def test_gradients(self, family):
        net, ids = model(family), tokens()
        own_loss, own = gradients(net, ids)
        with llama_fast.patch(net):
            loss, given = gradients(net, ids)
        torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=1e-6)
        for name in own:
            scale = own[name].abs().max()
            assert (given[name] - own[name]).abs().max() <= 1e-5 * scale, name

    def test_greedy_tokens(self, family):
        net = model(family)
        padded = left_padded(tokens())
        own = net.generate(**padded, max_new_tokens=60, do_sample=False)
        with llama_fast.patch(net):
            given = net.generate(**padded, max_new_tokens=60, do_sample=False)
        assert torch.equal(given, own)


def test_greedy_tokens_of_200_steps():
    net, ids = model(), tokens(1, 9)
    own = net.generate(ids, max_new_tokens=200, do_sample=False)
    with llama_fast.patch(net):
        assert torch.equal(net.generate(ids, max_new_tokens=200, do_sample=False), own)


@pytest.mark.parametrize("op", OPS)
def test_each_op_by_itself(op):
    net, ids = model(), tokens()
    own_loss, own = gradients(net, ids)
    with torch.no_grad():
        logits = net(ids[:, :5]).logits
    with llama_fast.patch(net, ops=[op]) as patch:
        assert {row.op for row in patch.report} == {op} and patch.report.replaced
        with torch.no_grad():
            torch.testing.assert_close(net(ids[:, :5]).logits, logits, rtol=1e-5, atol=1e-5)
        loss, given = gradients(net, ids)
    torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=1e-6)
    for name in own:
        assert (given[name] - own[name]).abs().max() <= 1e-5 * own[name].abs().max(), name


class TestUndo:
    def test_restores_the_same_objects(self):
        net = model()
        before = state(net)
        patch = llama_fast.patch(net)
        assert state(net) != before and patch.active
        patch.remove()
        assert state(net) == before and not patch.active

    def test_after_an_exception(self):
        net = model()
        before = state(net)
        with pytest.raises(ZeroDivisionError), llama_fast.patch(net):
            _ = 1 / 0
        assert state(net) == before

    def test_after_a_refusal(self):
        net = model("Qwen2")  # whose biases are left alone
        before = state(net)
        with pytest.raises(PatchError, match=r"layers\.0\.self_attn\.q_proj.*bias"):
            llama_fast.patch(net, strict=True)
        assert state(net) == before

    def test_removing_twice(self):
        net = model()
        before = state(net)
        patch = llama_fast.patch(net)
        patch.remove()
        patch.remove()
        assert state(net) == before

    def test_after_other_code_replaced_a_forward(self):
        net = model()
        patch = llama_fast.patch(net)
        norm = net.model.norm
        ours = norm.forward
        norm.forward = lambda x: ours(x)
        with pytest.raises(PatchError, match=r"LlamaRMSNorm was replaced by other code"):
            patch.remove()
        assert patch.active
        norm.forward = ours
        patch.remove()
        assert "forward" not in vars(norm)

    def test_settings_made_meanwhile_stay(self):
        net = model()
        original = net.config
        with llama_fast.patch(net):
            net.config.pad_token_id = 7
        assert net.config is original and original.pad_token_id == 7
        assert original._attn_implementation != "llama_fast"

    def test_weights_loaded_meanwhile_stay(self):
        net, ids = model(), tokens()
        other = {k: v * 1.5 for k, v in net.state_dict().items()}
        with llama_fast.patch(net):
            net.load_state_dict(other)
            given = net(ids).logits
        torch.testing.assert_close(given, net(ids).logits, rtol=1e-5, atol=1e-5)


class TestOtherModels:
    def test_a_model_never_patched_is_bit_identical(self):
        settings = config()  # shared by both
        torch.manual_seed(0)
        one, other = (transformers.LlamaForCausalLM(settings).eval() for _ in range(2))
        ids = tokens()
        before = state(other)
        with torch.no_grad():
            own = other(ids).logits
            patch = llama_fast.patch(one)
            assert torch.equal(other(ids).logits, own) and state(other) == before
            one(ids)
            assert torch.equal(other(ids).logits, own)
            assert settings._attn_implementation != "llama_fast"
            fresh = transformers.LlamaForCausalLM(settings)
            assert not any(map(is_patched, fresh.modules()))
            patch.remove()
            assert torch.equal(other(ids).logits, own) and state(other) == before

    def test_two_patched_models_are_independent(self):
        one, other, ids = model(), model("Qwen3"), tokens()
        patch, other_patch = llama_fast.patch(one), llama_fast.patch(other)
        patch.remove()
        assert other_patch.active and function_of(other.model.norm) is forwards.rms_norm
        other(ids)
        other_patch.remove()


class TestRefusals:
    def test_a_patched_model(self):
        net = model()
        with llama_fast.patch(net):
            before = state(net)
            for again in (net, net.model, net.model.layers[0]):
                with pytest.raises(PatchError, match=r"patched already.*remove\(\)"):
                    llama_fast.patch(again)
            assert state(net) == before
        with llama_fast.patch(net):  # after its removal it can be patched again
            pass

    def test_an_unsupported_model_type(self):
        with pytest.raises(PatchError, match=r"model type is gemma; supported are.*llama"):
            llama_fast.patch(model("Gemma"))

    def test_what_is_no_transformers_model(self):
        with pytest.raises(PatchError, match="no decoder layers"):
            llama_fast.patch(nn.Linear(3, 3))
        with pytest.raises(PatchError, match=r"a torch\.nn\.Module; given str"):
            llama_fast.patch("meta-llama/Llama-3.2-1B")

    def test_unknown_ops(self):
        with pytest.raises(PatchError, match=r"named rmsnorm; there are rms_norm, "):
            llama_fast.patch(model(), ops=["rmsnorm"])
        assert issubclass(PatchError, LlamaFastError)

    def test_a_forward_that_other_code_replaced(self):
        net = model()
        mlp = net.model.layers[1].mlp
        mlp.forward = own = lambda x: x
        with llama_fast.patch(net) as patch:
            (row,) = (r for r in patch.report.left_alone if r.op == "swiglu")
            assert row.module == "model.layers.1.mlp" and "other code has replaced" in row.reason
            assert mlp.forward is own
        assert mlp.forward is own

    def test_a_dtype_without_kernels(self):
        with llama_fast.patch(model().double()) as patch:
            assert not [row for row in patch.report.replaced if row.op != "linear_cross_entropy"]
            assert all("no kernel serves it" in row.reason for row in patch.report.left_alone)


class TestStructure:
    """A newer transformers, played by classes whose forwards have changed."""

    def changed(self, net: nn.Module, path: str, forward) -> Patch:
        module = net.get_submodule(path)
        module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
        return llama_fast.patch(net)

    def test_another_result(self):
        def plus_one(self, hidden_states):
            return (1 + self.weight) * nn.functional.normalize(hidden_states, dim=-1)

        with self.changed(model(), "model.norm", plus_one) as patch:
            (row,) = patch.report.left_alone
            assert row.module == "model.norm" and "computes something else" in row.reason

    def test_an_attribute_that_is_not_known(self):
        def scaled(self, x):
            h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h) * self.scale

        with self.changed(model(), "model.layers.1.mlp", scaled) as patch:
            (row,) = patch.report.left_alone
            assert row.module == "model.layers.1.mlp" and "'scale'" in row.reason

    def test_another_layer(self):
        def parallel(self, hidden_states, **kwargs):
            normed = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(hidden_states=normed, **kwargs)
            return hidden_states + attended + self.mlp(normed)

        net, ids = model(), tokens()
        patch = self.changed(net, "model.layers.0", parallel)
        given = net(ids).logits
        (row,) = patch.report.left_alone
        assert (row.module, row.op) == ("model.layers.0", "add_rms_norm")
        patch.remove()
        torch.testing.assert_close(given, net(ids).logits, rtol=1e-5, atol=1e-5)

    def test_another_activation(self):
        net = model(hidden_act="gelu")
        with llama_fast.patch(net) as patch:
            assert {row.op for row in patch.report.left_alone} == {"swiglu"}


class TestCopies:
    def test_deepcopy_is_patched_by_itself(self):
        net, ids = model(), tokens()
        before = state(net)
        patch = llama_fast.patch(net)
        twin = copy.deepcopy(net)
        assert twin.model.norm.forward.__self__ is twin.model.norm
        patch.remove()
        assert state(net) == before
        assert torch.equal(twin(ids).logits, copy.deepcopy(twin)(ids).logits)
        own = net(ids).logits
        torch.testing.assert_close(twin(ids).logits, own, rtol=1e-5, atol=1e-5)
        twin._llama_fast_patch.remove()
        assert not any(map(is_patched, twin.modules()))
        assert torch.equal(twin(ids).logits, own)

    def test_pickle_keeps_the_patch(self):
        net, ids = model(), tokens()
        with llama_fast.patch(net):
            given = net(ids).logits
            twin = pickle.loads(pickle.dumps(net))
        assert torch.equal(twin(ids).logits, given)
        twin._llama_fast_patch.remove()
        assert torch.equal(twin(ids).logits, net(ids).logits)

    def test_save_pretrained(self, tmp_path):
        net, ids = model(), tokens()
        net.save_pretrained(tmp_path / "own")
        with llama_fast.patch(net):
            net.save_pretrained(tmp_path / "patched")
        for file in (tmp_path / "own").iterdir():
            assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes(), file.name
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
        assert torch.equal(loaded(ids).logits, net(ids).logits)


class TestAttentionFunction:
    def test_by_its_name(self):
        net, ids = model(), tokens()
        named = model(attn_implementation="llama_fast")
        assert named.config._attn_implementation == "llama_fast"
        torch.testing.assert_close(named(ids).logits, net(ids).logits, rtol=1e-5, atol=1e-5)

    def test_weights_where_they_are_asked_for(self):
        ids = tokens()
        padded = left_padded(ids)
        own = model(attn_implementation="eager")(**padded, output_attentions=True).attentions
        net = model(attn_implementation="eager")
        with llama_fast.patch(net):
            given = net(**padded, output_attentions=True).attentions
        assert len(given) == 2
        for one, other in zip(given, own, strict=True):
            torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one[0, :, 6:], other[0, :, 6:], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("padding", ["none", "left", "right", "custom"])
    def test_masks(self, padding):
        net, ids = model(), tokens()
        inputs = {"input_ids": ids}
        if padding == "left":
            inputs = left_padded(ids)
        elif padding == "right":
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][1, -4:] = 0
        elif padding == "custom":  # (B,1,T,S), numbers to add: blocks of 7 tokens
            block = torch.arange(21) // 7
            seen = (block[:, None] == block) & torch.ones(21, 21).tril().bool()
            low = torch.finfo(torch.float32).min
            inputs["attention_mask"] = torch.where(seen, 0.0, low).expand(2, 1, 21, 21)
        mask = inputs.get("attention_mask")
        kept = mask.bool() if mask is not None and mask.ndim == 2 else torch.ones(2, 21).bool()
        own = net(**inputs).logits
        with llama_fast.patch(net):
            given = net(**inputs).logits
            with torch.no_grad():  # without a gradient other kernels may serve
                read = net(**inputs).logits
        for logits in (given, read):
            torch.testing.assert_close(logits[kept], own[kept], rtol=1e-5, atol=1e-5)

    def test_sliding_window(self):
        net, ids = model("Mistral", sliding_window=8), tokens()
        own = net(ids).logits
        tokens_own = net.generate(ids, max_new_tokens=20, do_sample=False)
        with llama_fast.patch(net):
            torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)
            assert torch.equal(net.generate(ids, max_new_tokens=20, do_sample=False), tokens_own)


class TestLoss:
    def test_without_logits_in_training_alone(self):
        net, ids = model(), tokens()
        with llama_fast.patch(net):
            assert net(ids, labels=ids).logits is not None
            net.train()
            deferred = net(ids, labels=ids).logits
            assert isinstance(deferred, DeferredLogits)
            assert deferred.shape == (2, 21, 257) and deferred[0].requires_grad
            assert net(ids, labels=ids, return_dict=False)[1].shape == (2, 21, 257)

    def test_items_in_batch_and_ignored_labels(self):
        net, ids = model().train(), tokens()
        labels = ids.masked_fill(torch.arange(21) < 9, -100)
        own = [net(ids, labels=labels, num_items_in_batch=n).loss for n in (None, 13)]
        nothing = torch.full_like(ids, -100)
        with llama_fast.patch(net):
            given = [net(ids, labels=labels, num_items_in_batch=n).loss for n in (None, 13)]
            assert net(ids, labels=nothing, num_items_in_batch=13).loss == 0
        torch.testing.assert_close(given, own, rtol=1e-6, atol=1e-6)


class TestReport:
    def test_names_what_was_done(self):
        net = model("Qwen2")
        with llama_fast.patch(net) as patch:
            text = str(patch.report)
        assert "model.layers.*.mlp " in text and "swiglu" in text
        assert "left alone" in text and "it has a bias" in text
        served = {row.op for row in patch.report.replaced}
        assert served == set(OPS)
        assert {row.backend for row in patch.report.replaced} == {"cpu"}

    def test_base_models_and_other_heads(self):
        for kind in ("Model", "ForSequenceClassification"):
            with llama_fast.patch(model(kind=kind)) as patch:
                assert {row.op for row in patch.report} == set(OPS) - {"linear_cross_entropy"}


def twice_swiglu(self, x):
    return 2 * forwards.swiglu(self, x)


class TestVerify:
    def test_says_that_nothing_departs(self):
        net = model().train()
        with llama_fast.patch(net) as patch:
            before = state(net)
            found = patch.verify(tokens())
            assert state(net) == before and net.training
        assert found.ok and found.difference < 1e-5 and found.agreement == 1.0
        assert abs(found.kl) < 1e-9 and "departs nowhere" in str(found)
        with pytest.raises(PatchError, match="has been removed"):
            patch.verify(tokens())

    def test_names_the_first_module_that_departs(self):
        net = model()
        with llama_fast.patch(net) as patch:
            mlp = net.model.layers[1].mlp
            unpatch_class(mlp)
            patch_class(mlp, twice_swiglu)
            found = patch.verify({"input_ids": tokens()})
        assert found.departed == "model.layers.1.mlp" and not found.ok and found.kl > 0
