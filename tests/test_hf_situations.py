"""Patched models in the hands of other software, and changed after they were patched."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from torch import nn

import llama_fast
from llama_fast.errors import PatchError
from llama_fast.hf.patched import is_patched
from tests.hf_models import left_padded, model, tokens


def both(change=None, *, net=None, run=None) -> tuple:
    """What a model gives without the patch and with it, when `change(net)` has happened to it
    after the patch, or as well without one."""
    run = run or (lambda net: net(tokens()).logits)
    found = []
    for patched in (False, True):
        made = copy.deepcopy(net) if net is not None else model()
        patch = llama_fast.patch(made) if patched else None
        if change:
            change(made)
        found.append(run(made))
        if patch:
            assert patch.active
    return tuple(found)


def assert_same(found: tuple) -> None:
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


class TestArguments:
    @pytest.mark.parametrize("return_dict", [True, False, None])
    def test_return_dict_beside_labels(self, return_dict):
        def run(net):
            ids = tokens()
            return net.train()(input_ids=ids, labels=ids, return_dict=return_dict)[0]

        assert_same(both(run=run))

    def test_every_argument_of_the_own_forward(self):
        def run(net):
            ids = tokens()
            out = net.train()(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1])[None],
                past_key_values=None,
                inputs_embeds=None,
                labels=ids,
                use_cache=False,
                logits_to_keep=0,
                output_attentions=False,
                output_hidden_states=True,
                return_dict=True,
            )
            return torch.stack([out.loss, out.hidden_states[-1].sum()])

        assert_same(both(run=run))


class TestUnwrapped:
    def test_accelerate_puts_back_what_it_took(self):
        accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
        net, ids = model(), tokens()
        own = net(ids).logits
        patch = llama_fast.patch(net)
        state = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared = state.prepare(net)
        prepared(ids)
        unwrapped = state.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped is net
        torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)
        patch.remove()
        assert not any(map(is_patched, net.modules())) and "forward" not in vars(net)
        assert torch.equal(net(ids).logits, own)

    def test_a_wrapper_that_stays_is_refused_or_taken_away(self):
        net, ids = model(), tokens()
        own = net(ids).logits
        patch = llama_fast.patch(net)
        mlp = net.model.layers[0].mlp
        inner = mlp.forward
        mlp.forward = lambda x: 2 * inner(x)
        changed = net(ids).logits
        with pytest.raises(PatchError, match=r"remove\(force=True\)"):
            patch.remove()
        assert patch.active and torch.equal(net(ids).logits, changed)
        patch.remove(force=True)
        assert not patch.active and torch.equal(net(ids).logits, own)

    def test_a_wrapper_that_was_there_stays(self):
        """A model that accelerate prepared, or gave hooks, before it was patched."""
        net, ids, calls = model(), tokens(), []
        inner = net.forward
        net.forward = wrapper = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
        with llama_fast.patch(net) as patch:
            assert any(row.module == "" for row in patch.report.left_alone)
            net(ids)
            assert len(calls) == 1
        assert vars(net)["forward"] is wrapper and not is_patched(net)

    def test_the_forward_that_a_module_had_stays(self):
        """A bound method of its own, as accelerate leaves it."""
        net, ids = model(), tokens()
        mlp = net.model.layers[1].mlp
        mlp.forward = bound = mlp.forward
        own = net(ids).logits
        with llama_fast.patch(net) as patch:
            assert not patch.report.left_alone and not torch.equal(net(ids).logits, own)
        assert vars(mlp)["forward"] == bound and torch.equal(net(ids).logits, own)


class TestShared:
    @pytest.mark.parametrize("what", ["layer", "norm"])
    def test_a_module_that_stands_in_several_places(self, what):
        net, ids = model(), tokens()
        first, second = net.model.layers
        if what == "layer":
            net.model.layers[1] = first
        else:
            second.input_layernorm = net.model.norm = first.input_layernorm
        own = net(ids).logits
        with llama_fast.patch(net):
            torch.testing.assert_close(net(ids).logits, own, rtol=1e-5, atol=1e-5)
        assert not any(map(is_patched, net.modules()))
        assert torch.equal(net(ids).logits, own)


class TestReplicas:
    def test_a_replica_runs_on_its_own_weights(self):
        """As torch.nn.parallel.replicate makes them, which needs GPUs."""
        net, ids = model(), tokens()
        llama_fast.patch(net)
        modules = list(net.modules())
        places = {module: i for i, module in enumerate(modules)}
        replicas = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, replicas, strict=True):
            for name, child in module._modules.items():
                replica._modules[name] = replicas[places[child]]
                setattr(replica, name, replicas[places[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.detach() * 1.1)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
            torch.testing.assert_close(replicas[0](ids).logits, twin(ids).logits)


class TestMemory:
    @pytest.mark.parametrize("handle", ["kept", "dropped"])
    def test_a_deleted_model_is_freed_at_once(self, handle):
        net = model()
        patch = llama_fast.patch(net)
        net(tokens())
        if handle == "dropped":
            del patch
        weights = [weakref.ref(p) for p in net.parameters()]
        gc.collect()
        gc.disable()
        try:
            del net
            assert not any(weight() is not None for weight in weights)
        finally:
            gc.enable()
        if handle == "kept":
            assert not patch.active
            patch.remove()
            with pytest.raises(PatchError, match="is gone"):
                _ = patch.model


class Counts(nn.Module):
    """A weight that is no float, as quantising libraries have."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        if kind == "parameter":
            self.weight = nn.Parameter(values, requires_grad=False)
        else:
            self.register_buffer("qweight", values)

    def forward(self, x):
        values = self.weight if hasattr(self, "weight") else self.qweight
        return nn.functional.linear(x, values.to(x.dtype) * self.scale.to(x.dtype))


class TestQuantised:
    @pytest.mark.parametrize("kind", ["parameter", "buffer"])
    def test_norms_rotation_attention_and_swiglu_are_patched(self, kind):
        net = model()
        for module in list(net.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Counts(child, kind))
        ids = tokens()
        own = net(ids).logits
        with llama_fast.patch(net) as patch:
            served = {row.op for row in patch.report.replaced}
            assert {"rms_norm", "add_rms_norm", "rope", "attention", "swiglu"} <= served
            given = net(ids).logits
        assert not torch.equal(given, own)
        torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)

    def test_weights_of_float8(self):
        net = model()
        for layer in net.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
                linear.weight = nn.Parameter(
                    linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
                )
        with llama_fast.patch(net) as patch:
            left = {row.module.rsplit(".", 1)[1] for row in patch.report.left_alone}
            assert left == {"q_proj", "down_proj"}

    def test_dynamic_int8_of_torch(self):
        net = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
        ids = tokens()
        own = net(ids).logits
        with llama_fast.patch(net) as patch:
            assert "swiglu" in {row.op for row in patch.report.replaced}
            torch.testing.assert_close(net(ids).logits, own, rtol=1e-2, atol=1e-2)


def hook_act(net):
    net.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, i, o: o * 3)


def other_act(net):
    net.model.layers[0].mlp.act_fn = nn.GELU()


def act_function(net):
    mlp = net.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = torch.tanh


def replaced_act(net):
    net.model.layers[0].mlp.act_fn.forward = torch.tanh


def hook_norm(net):
    for norm in (net.model.layers[0].post_attention_layernorm, net.model.layers[1].input_layernorm):
        norm.register_forward_hook(lambda m, i, o: o * 2)


def other_norm(net):
    for layer in net.model.layers:
        layer.post_attention_layernorm = nn.RMSNorm(64, eps=1e-2)
        layer.input_layernorm = nn.LayerNorm(64)
    net.model.norm = nn.Identity()


def norm_without_eps(net):
    for module in net.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def biased_projection(net):
    for layer in net.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(64))
        layer.mlp.down_proj.bias = nn.Parameter(torch.ones(64))


def biased_head(net):
    net.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 257))


def replaced_layer(net):
    net.model.layers[0].forward = lambda hidden_states, **kwargs: hidden_states


def replaced_projection(net):
    net.model.layers[0].mlp.up_proj.forward = lambda x: x.new_ones(*x.shape[:-1], 144)


def scaled_queries(net):
    for layer in net.model.layers:
        layer.self_attn.scaling = torch.tensor(0.01)


def fewer_layers(net):
    del net.model.layers[1]


CHANGES = [
    hook_act,
    other_act,
    act_function,
    replaced_act,
    hook_norm,
    other_norm,
    norm_without_eps,
    biased_projection,
    biased_head,
    replaced_layer,
    replaced_projection,
    scaled_queries,
    fewer_layers,
]


class TestChangedAfterwards:
    @pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
    def test_logits(self, change):
        found = both(change)
        assert not torch.allclose(found[0], model()(tokens()).logits, rtol=1e-3, atol=1e-3)
        assert_same(found)

    @pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
    def test_loss(self, change):
        ids = tokens()
        assert_same(both(change, run=lambda net: net.train()(ids, labels=ids).loss))

    @pytest.mark.parametrize("weight", ["transposed", "strided", "padded"])
    def test_a_head_of_another_layout(self, weight):
        def change(net):
            w = net.lm_head.weight.detach()
            if weight == "transposed":
                w = w.t().contiguous().t()
            elif weight == "strided":
                w = w.repeat_interleave(2, dim=1)[:, ::2]
            else:
                w = torch.cat((w, w), dim=1)[:, :64]
            assert not w.is_contiguous()
            net.lm_head.weight = nn.Parameter(w)

        def run(net):
            ids = tokens()
            loss = net.train()(ids, labels=ids).loss
            loss.backward()
            return loss.detach(), net.lm_head.weight.grad, net.model.norm.weight.grad

        for own, given in zip(*both(change, run=run), strict=True):
            torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)


class TestMasks:
    def test_edited_in_place_between_two_calls(self):
        """What was read from it is read anew."""
        net, inputs = model(), left_padded(tokens())
        embeds = net.model.embed_tokens(inputs["input_ids"])
        made = transformers.masking_utils.create_causal_mask(
            config=net.config,
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            past_key_values=None,
            **(
                {"position_ids": None}
                if transformers.__version__ >= "5"
                else {"cache_position": torch.arange(21)}
            ),
        )

        def run(net):
            mask, found = made.clone(), []
            for _ in range(2):
                found.append(net(inputs["input_ids"], attention_mask=mask).logits[:, 6:])
                mask[:, :, :, 9] = False
            return torch.stack(found)

        found = both(net=net, run=run)
        assert not torch.allclose(found[0][0], found[0][1])
        assert_same(found)

    def test_knocked_out_by_a_hook(self):
        """A hook that hides keys from one layer's attention, in the mask that all share."""

        def change(net):
            def hide(module, args, kwargs):
                if kwargs["attention_mask"] is not None:
                    kwargs["attention_mask"][..., 8] = False
                return args, kwargs

            net.model.layers[1].self_attn.register_forward_pre_hook(hide, with_kwargs=True)

        inputs = left_padded(tokens())
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                found = both(change, run=lambda net: net(**inputs).logits[:, 9:].clone())
            assert_same(found)


class TestAttentionFunction:
    def test_sinks_go_to_the_eager_function_of_the_model(self):
        settings = transformers.GptOssConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=99, num_local_experts=2,
            num_experts_per_tok=1, sliding_window=6, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        net = transformers.GptOssForCausalLM(settings).eval()
        for name, parameter in net.named_parameters():
            nn.init.normal_(parameter, std=2.0 if "sinks" in name else 0.3)
        ids = tokens() % 99
        twin = copy.deepcopy(net)
        net.config._attn_implementation = "eager"
        twin.config._attn_implementation = "llama_fast"
        own, given = net(ids).logits, twin(ids).logits
        torch.testing.assert_close(given, own, rtol=1e-4, atol=1e-4)
        given.sum().backward()
        assert twin.model.layers[0].self_attn.sinks.grad.abs().max() > 0

    def test_values_of_another_width_than_keys(self):
        net = model(attn_implementation="llama_fast")
        attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["llama_fast"]
        sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        module = net.model.layers[0].self_attn
        q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 8)
        args = (module, q, k, v, None)
        given, own = attention(*args, scaling=0.2)[0], sdpa(*args, scaling=0.2)[0]
        torch.testing.assert_close(given, own)


class TestConfig:
    def test_says_nothing_of_the_patch(self):
        net = model()
        llama_fast.patch(net)
        assert b"llama_fast" not in pickle.dumps(net.config)
        assert "llama_fast" not in str(net.config.to_dict())
        second = transformers.LlamaForCausalLM(net.config)
        assert second.config._attn_implementation != "llama_fast"
        assert not any(map(is_patched, second.modules()))

    def test_an_attention_chosen_later_serves(self):
        def change(net):
            net.set_attn_implementation("eager")

        assert_same(both(change))


class TestLogits:
    def test_made_when_they_are_asked_for(self):
        net, ids = model().train(), tokens()
        own = net(ids, labels=ids).logits
        with llama_fast.patch(net):
            out = net(ids, labels=ids)
            assert "made when they are used" in repr(out.logits)
            torch.testing.assert_close(out.logits[:, -1], own[:, -1], rtol=1e-5, atol=1e-5)
            assert torch.equal(torch.argmax(out.logits, -1), own.argmax(-1))
            assert torch.equal(out["logits"].float() * 2, 2 * out[1].float())
            (out.loss + out.logits.logsumexp(-1).mean()).backward()
            assert net.lm_head.weight.grad.isfinite().all()


class TestCompiled:
    def test_layers_by_themselves_are_one_graph(self):
        """Each decoder layer compiled alone, as people compile deep models."""
        graphs = {}
        for patched in (False, True):
            torch._dynamo.reset()
            net = model(num_hidden_layers=12)
            if patched:
                llama_fast.patch(net)
            for layer in net.model.layers:
                layer.compile(fullgraph=True, backend="eager")
            torch._dynamo.utils.counters.clear()
            with torch.no_grad():
                net(tokens(), use_cache=False)
            graphs[patched] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs[True] == graphs[False], graphs

    def test_exported_without_the_bytecode_tracer(self):
        net, ids = model(), tokens()
        llama_fast.patch(net)
        with torch.no_grad():
            own = net(ids, use_cache=False).logits
            program = torch.export.export(
                net, (), {"input_ids": ids, "use_cache": False}, strict=False
            )
            given = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)
