"""Adapters on this package's model: values and gradients, integers, switching, decode steps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.dispatch import use_backend
from llama_fast.errors import ConfigError
from llama_fast.generation.engine import Engine
from llama_fast.generation.session_file import fingerprint
from llama_fast.model import Llama
from llama_fast.model.quantized import quantize_
from llama_fast.nn.lora import AdaptedLinear, adapter_names
from llama_fast.training.adapter import LINEAR, Adapter, load_adapter, lora

CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=80,
    max_seq_len=64,
    tied=True,
)
TOKENS = torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(2))


def new_model(tied: bool = True, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(3)
    model = Llama(dataclasses.replace(CONFIG, tied=tied), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.to(dtype).eval()


def filled(adapter: Adapter, scale: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapter


def bits(model: Llama) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all", ["q_proj", "up_proj"]])
def test_values_and_gradients_are_those_of_the_merged_weight(dora, targets):
    """In float64, where the definition is W + s·B A itself, differentiated by torch."""
    model = new_model().double()
    adapter = filled(lora(model, 3, 6, dora=dora, targets=targets, dtype=torch.float64))
    layer = model.layers[1].attention.qkv
    x = torch.randn(5, CONFIG.dim, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, layer.weight.shape[0], dtype=torch.float64)
    low_rank = layer.lora["default"]
    wanted = [x, low_rank.A, *low_rank.B, *low_rank.magnitude]
    with use_backend("eager"):
        given = torch.autograd.grad((layer(x) * g).sum(), wanted)

    A = dict(zip((b.index for b in low_rank.blocks), low_rank.A.split(low_rank.ranks), strict=True))
    rows = []
    for index, W in enumerate(layer.weight.split(layer.sizes)):
        if index in A:
            at = list(A).index(index)
            W = W + 2 * low_rank.B[at] @ A[index]
            if dora:
                W = W * (low_rank.magnitude[at] / W.detach().norm(dim=1)).unsqueeze(1)
        rows.append(W)
    expected = torch.autograd.grad((x @ torch.cat(rows).t() * g).sum(), wanted)
    assert len(given) == len(expected) == 2 + len(A) * (1 + dora)
    # The norm of a row is made in float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dora else {"rtol": 1e-10, "atol": 1e-10}
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert adapter.n_parameters == sum(p.numel() for p in adapter.parameters())


def test_a_new_adapter_changes_no_bit_and_only_it_is_trained():
    model = new_model()
    expected = model(TOKENS)
    adapter = lora(model)
    assert torch.equal(model(TOKENS), expected)
    model.loss(TOKENS, TARGETS).backward()
    trained = {id(p) for p in adapter.parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_within_twice_the_rounding_of_a_merged_model(dtype):
    model = new_model(dtype=dtype)
    exact = new_model(dtype=dtype).double()
    adapter = filled(lora(model))
    filled(lora(exact, dtype=torch.float64)).load(adapter.tensors())
    with torch.no_grad(), use_backend("eager"):
        expected = exact(TOKENS).double()
    with torch.no_grad():
        given = model(TOKENS).double()
        adapter.merge()
        merged = model(TOKENS).double()
    assert (given - expected).abs().max() <= 2 * (merged - expected).abs().max()


def test_dropout_is_of_training_alone():
    model = new_model()
    filled(lora(model, dropout=0.5))
    plain = model(TOKENS)
    assert torch.equal(model(TOKENS), plain)
    model.train()
    torch.manual_seed(0)
    first = model(TOKENS)
    assert not torch.equal(first, plain) and not torch.equal(model(TOKENS), first)
    torch.manual_seed(0)
    assert torch.equal(model(TOKENS), first)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_have_the_gradient_of_a_whole_head(tied):
    """The head's gradient is made for the trained rows alone."""
    rows = [5, 79, 0]
    model, whole = new_model(tied), new_model(tied)
    adapter = lora(model, targets=["q_proj"], rows=rows)
    targets = TARGETS.clone()
    targets[0, :4] = -100
    targets[1, :3] = torch.tensor(rows)
    loss = model.loss(TOKENS, targets)
    expected = whole.loss(TOKENS, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    found = {name: p.grad for name, p in adapter.named_parameters() if name.endswith("values")}
    assert found.keys() == ({"embed.values"} if tied else {"embed.values", "head.values"})
    for name, grad in found.items():
        own = whole.get_submodule(name.removesuffix(".values")).weight.grad[rows]
        torch.testing.assert_close(grad, own, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain = model(TOKENS).log_softmax(-1).flatten(0, 1)
    kept = targets.flatten() >= 0
    by_logits = -plain[kept].gather(1, targets.flatten()[kept, None]).mean()
    torch.testing.assert_close(loss.detach(), by_logits, rtol=1e-5, atol=1e-5)


# --- integers --------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["int8", "int4"])
def test_over_integers(named, tmp_path):
    model = quantize_(new_model(), named)
    plain, state = model(TOKENS), bits(model)
    adapter = filled(lora(model, dora=named == "int8", rows=[7], modules_to_save=["norm"]))
    changed = model(TOKENS)
    assert not torch.equal(changed, plain)
    model.loss(TOKENS, TARGETS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    adapter.save(tmp_path / "adapter")
    adapter.unload()
    assert same(bits(model), state) and torch.equal(model(TOKENS), plain)

    adapter = load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(TOKENS), changed)
    adapter.merge()  # into what the integers stand for
    assert all(isinstance(p, torch.Tensor) for p in model.state_dict().values())
    torch.testing.assert_close(model(TOKENS), changed, rtol=1e-4, atol=1e-4)
    assert model.head.weight is model.embed.weight
    model.save_pretrained(tmp_path / "merged")

    before = new_model()  # the other merge: into the weights before they were rounded
    load_adapter(before, tmp_path / "adapter").merge()
    exact = new_model()
    load_adapter(exact, tmp_path / "adapter")
    torch.testing.assert_close(before(TOKENS), exact(TOKENS), rtol=1e-4, atol=1e-4)


# --- switching -------------------------------------------------------------------------------


def test_several_adapters_add_up_and_are_switched_and_unloaded():
    model = new_model()
    state, plain = bits(model), model(TOKENS)
    first = filled(lora(model, 2, targets=["q_proj"], name="first"))
    one = model(TOKENS)
    second = filled(lora(model, 4, targets=["v_proj", "down_proj"], name="second"))
    both = model(TOKENS)
    assert adapter_names(model) == ["first", "second"]
    with first.disabled(), second.disabled():
        assert torch.equal(model(TOKENS), plain)
    with second.disabled():
        assert torch.equal(model(TOKENS), one)
        assert not second.enabled
    assert torch.equal(model(TOKENS), both)
    with pytest.raises(KeyError), second.disabled():
        raise KeyError
    assert second.enabled
    with pytest.raises(ConfigError, match="has an adapter 'first' already"):
        lora(model, name="first")
    with pytest.raises(ConfigError, match="'second' is on the model too"):
        first.merge()
    second.unload()
    assert torch.equal(model(TOKENS), one)
    with pytest.raises(ConfigError, match="no longer on its model"):
        second.enable()
    first.unload()
    assert same(bits(model), state) and torch.equal(model(TOKENS), plain)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_takes_no_adapter_is_left_as_it_was():
    model = new_model()
    model.layers[1].mlp.down = torch.nn.Linear(96, 64, bias=False)
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down is a Linear, which takes no"):
        lora(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_adapters_that_train_one_module_whole_exclude_each_other():
    model = new_model()
    first = lora(model, modules_to_save=["norm"], name="first")
    first.disable()
    second = lora(model, modules_to_save=["norm"], name="second")
    with pytest.raises(ConfigError, match="another adapter trains it whole"):
        first.enable()
    second.disable()
    first.enable()


def test_a_copy_of_the_model_has_adapters_of_its_own():
    model = new_model()
    adapter = filled(lora(model))
    copied = copy.deepcopy(model)
    expected = model(TOKENS)
    adapter.unload()
    assert torch.equal(copied(TOKENS), expected)


def test_a_folder_of_the_model_would_lose_the_adapter(tmp_path):
    model = new_model()
    lora(model)
    with pytest.raises(ConfigError, match=r"adapter default.*adapter\.merge"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ["query"]}, "no module 'query'.*q_proj"),
        ({"targets": "nothing.*"}, "are no modules of the model"),
        ({"rows": [80]}, "rows 80 to 80.*it has 80"),
        ({"rows": [3, 3]}, "each once"),
        ({"name": "a.b"}, "letters, digits"),
        ({"modules_to_save": ["q_proj"]}, "offered for embed_tokens"),
        ({"targets": ["embed_tokens"], "dora": True}, "DoRA of linear"),
        ({"rows": [1], "modules_to_save": ["embed_tokens"]}, "choose one of them"),
        ({"dtype": torch.int8}, "give a float one"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_changes(settings, message):
    model = new_model()
    with pytest.raises(ConfigError, match=message):
        lora(model, **settings)
    assert not adapter_names(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- around it -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dora", [False, True])
def test_a_recorded_decode_step_notices_what_is_switched(mode, dora):
    model = new_model()
    adapter = filled(lora(model, targets=["q_proj", "up_proj", "embed_tokens"], dora=False), 0.3)
    more = filled(lora(model, dora=dora, targets=["down_proj"], rows=[7, 8], name="more"), 0.3)

    def step_logits(engine: Engine) -> torch.Tensor:
        engine.truncate([4])
        return engine.step(torch.tensor([7])).clone()

    def expected() -> torch.Tensor:
        return model(torch.tensor([[1, 2, 3, 4, 7]]))[:, -1]

    with mode():
        with Engine.acquire(model, 1, 16) as engine:
            engine.prefill([[1, 2, 3, 4]])

            def follow(change) -> torch.Tensor:
                change()
                engine.truncate([0])
                engine.prefill([[1, 2, 3, 4]])
                for _ in range(4):  # warms up, captures, replays
                    found = step_logits(engine)
                    torch.testing.assert_close(found, expected(), rtol=1e-4, atol=1e-4)
                assert engine.captured(1).replay is not None
                return found

            seen = [
                follow(change)
                for change in (
                    lambda: None, more.disable, adapter.disable, more.enable, adapter.enable
                )
            ]  # fmt: skip
    assert torch.equal(seen[0], seen[-1]) and len({float(x.sum()) for x in seen}) == 4
    with torch.no_grad():
        adapter.parameters()[0].add_(1)  # what a replay reads may change in place


def test_a_kept_session_is_told_apart_by_what_is_enabled():
    """Its keys and values were made with the adapter, or with another strength of it."""
    model = new_model()
    seen = {fingerprint(model)}
    adapter = lora(model, 4, 8)
    seen.add(fingerprint(model))
    adapter.disable()
    seen.add(fingerprint(model))
    adapter.unload()
    assert fingerprint(model) in seen
    torch.manual_seed(3)
    for alpha in (8, 16):
        torch.manual_seed(3)
        adapter = lora(model, 4, alpha)
        seen.add(fingerprint(model))
        adapter.unload()
    assert len(seen) == 5


def test_compiled():
    model = new_model()
    filled(lora(model, dora=True, rows=[3]))
    expected = model.loss(TOKENS, TARGETS)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    assert expected.isfinite()


def test_dora_follows_a_weight_that_is_written_to():
    model = new_model()
    adapter = filled(lora(model, dora=True, targets=["o_proj"]))
    module = model.layers[0].attention.output
    x = torch.randn(3, 64)
    before = module(x)
    with torch.no_grad():
        module.weight.mul_(1.5)
        low_rank = module.lora["default"]
        W = module.weight + 2 * low_rank.B[0] @ low_rank.A
        expected = x @ W.t() * (low_rank.magnitude[0] / W.norm(dim=1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, expected) and adapter.enabled


def test_strict_backends_serve_it():
    model = new_model()
    filled(lora(model))
    expected = model(TOKENS)
    with use_backend("eager", strict=True):
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert len(LINEAR) == 7
