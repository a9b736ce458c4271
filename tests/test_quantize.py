"""Quantised models: the settings, how well the weights are rounded, and what it costs in text."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.backends import cpu
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import NAMED, Quantization, WeightFormat
from llama_fast.demo import FOLDER
from llama_fast.errors import ConfigError, ShapeError
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.model.quantized import quantization_of, quantize_
from llama_fast.ops import QuantizedWeight
from llama_fast.ops.quantized_layout import levels, numbers
from llama_fast.ops.quantized_weight import round_rows, round_weight
from llama_fast.ops.rounding import enclosing, encode, search_scales
from llama_fast.quantization.gptq import round_compensated
from llama_fast.tokenizer import Tokenizer
from tools.demo_model.recipe import held_out_data

FOUR = WeightFormat(4, 32)
UNTIED = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=176, vocab_size=320
)

# --- settings ---------------------------------------------------------------------------------


def test_names_give_settings():
    assert Quantization.of("int8").mlp == WeightFormat(8, 64)
    assert Quantization.of("int4").mlp == FOUR
    assert Quantization.of("int4").head == Quantization.of("int4").embedding == FOUR
    assert Quantization.of(NAMED["int8"]) is NAMED["int8"]
    assert str(NAMED["int4"]) == "int4"


def test_settings_say_what_they_are():
    mixed = Quantization(FOUR, WeightFormat(4, 64, symmetric=False), None, None)
    assert str(mixed) == (
        "attention: 4 bits in groups of 32; mlp: 4 bits in groups of 64 with minima; "
        "embedding, head: as stored"
    )
    assert str(Quantization(*[WeightFormat(4, 64)] * 4)) == "4 bits in groups of 64"
    for settings in (*NAMED.values(), mixed):
        assert Quantization.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Quantization.of("int3"), r"quantize is 'int3'.*'int8', 'int4'"),
        (lambda: Quantization.of(8), "quantize is 8"),
        (lambda: WeightFormat(3, 32), "bits of a quantised weight is 3; it must be one of 8, 4"),
        (lambda: WeightFormat(8, 48), "group_size of a quantised weight is 48.*32, 64, 128"),
        (lambda: WeightFormat(8.0, 64), "bits of a quantised weight is 8.0"),
        (lambda: WeightFormat(8, 64, 1), "symmetric of a quantised weight is 1"),
        (lambda: Quantization.from_dict({"mlp": None}), "attention, mlp, embedding, head"),
        (lambda: Quantization.from_dict([]), "attention, mlp, embedding, head"),
        (
            lambda: Quantization.from_dict({**NAMED["int4"].to_dict(), "mlp": {"bits": 4}}),
            "mlp is .*it must be null or have bits, group_size and symmetric",
        ),
    ],
)
def test_wrong_settings_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# --- rounding ---------------------------------------------------------------------------------


def rounding_error(groups: torch.Tensor, scales: torch.Tensor) -> float:
    values = numbers(encode(groups, scales, None, 4).float(), scales.float().unsqueeze(-1), None, 4)
    return float((groups - values).square().mean().sqrt())


@pytest.mark.parametrize("group_size", [32, 128])
def test_searched_scales_leave_less_error(group_size):
    groups = torch.randn(300, 7, group_size, generator=torch.Generator().manual_seed(0))
    found = rounding_error(groups, search_scales(groups))
    assert found < 0.97 * rounding_error(groups, enclosing(groups, 4, True)[0])
    assert found < 0.86 * rounding_error(groups, (groups.abs().amax(-1) / 53).half())
    # Even steps, as llama.cpp's q4_0 has them.
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (torch.where(-low > high, low, high) / -8).half().float()
    even = (groups / step).round().clamp(-8, 7) * step
    assert found < 0.9 * float((groups - even).square().mean().sqrt())


def test_searched_scales_of_zeros_and_of_what_codes_can_hold():
    groups = torch.zeros(2, 1, 32)
    groups[1] = levels(torch.arange(-8.0, 8.0), 4).repeat(2) * 0.125
    scales = search_scales(groups)
    assert scales[0] == 0
    assert rounding_error(groups[1:], scales[1:]) == 0


@pytest.mark.parametrize(
    ("form", "at_1e5", "at_1e6"),
    [
        (FOUR, 0.09, 0.12),
        (WeightFormat(4, 64, False), 0.093, 0.102),
        (WeightFormat(8, 64), 0.0072, 0.018),
        (WeightFormat(8, 64, False), 0.0065, 0.018),
    ],
    ids=str,
)
def test_small_weights_are_as_close_as_float16_scales_let(form, at_1e5, at_1e6):
    """These scales are subnormal numbers of float16; rounded down, they would be 0 at last."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for std, most in ((1e-5, at_1e5), (1e-6, at_1e6)):
        error = round_weight(weight * std, form).dequantize() / std - weight
        assert error.square().mean().sqrt() < most


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize("form", [FOUR, WeightFormat(4, 64, False), WeightFormat(8, 64)], ids=str)
def test_weights_that_cannot_be_stored_are_refused(form, value):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = value
    for rounding in (round_weight, lambda *a: round_compensated(a[0], torch.eye(64), a[1])):
        with pytest.raises(ShapeError, match="finite" if abs(value) != 1e9 else "float16"):
            rounding(weight, form)


def test_a_gpu_rounds_large_pieces_of_bounded_memory():
    """Each piece is some hundred launches: meta tensors stand for a GPU's, and count them."""

    class Launches(TorchDispatchMode):
        count = largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            self.count += 1
            if isinstance(found, torch.Tensor) and found is not whole:
                self.largest = max(self.largest, found.nbytes)
            return found

    C_out, C_in = 2**17, 2**11  # 2²⁸ weights
    whole = torch.empty(C_out, C_in, dtype=torch.bfloat16, device="meta")
    made = QuantizedWeight(C_out, C_in, 4, 32, device="meta")
    with Launches() as launches:
        for _, groups in made.row_blocks(whole):
            search_scales(groups)
    assert launches.count < 2000 and launches.largest <= 2**28


def test_codes_do_not_depend_on_threads():
    weight = torch.randn(400, 1024, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(round_weight(weight, FOUR))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*(weight.buffers() for weight in found), strict=True):
        assert torch.equal(a, b)


# --- a model ----------------------------------------------------------------------------------


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(UNTIED, dtype=torch.bfloat16)


def test_a_model_is_quantised_in_place(model):
    floats = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    assert quantization_of(model) is None
    assert quantize_(model, "int4") is model
    assert quantization_of(model) == NAMED["int4"]
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert name.endswith("norm.weight") and torch.equal(parameter, floats[name])
    qkv = model.layers[1].attention.qkv.weight
    expected = round_weight(floats["layers.1.attention.qkv.weight"], FOUR)
    assert torch.equal(qkv.qdata, expected.qdata) and torch.equal(qkv.scales, expected.scales)
    assert model.head.weight is not model.embed.weight
    assert model.head.weight.bits == model.embed.weight.bits == 4


def test_kinds_are_chosen_one_by_one(model):
    settings = Quantization(None, WeightFormat(8, 32, symmetric=False), None, FOUR)
    quantize_(model, settings)
    assert quantization_of(model) == settings
    block = model.layers[0]
    assert not isinstance(block.attention.output.weight, QuantizedWeight)
    assert block.mlp.down.weight.minima is not None
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.int64))).all()


def test_quantising_twice_is_refused(model):
    quantize_(model, "int8")
    with pytest.raises(ConfigError, match=r"quantised already \(int8\)"):
        quantize_(model, "int4")


def test_a_mixture_within_a_kind_is_refused(model):
    weight = model.layers[1].mlp.down.weight
    model.layers[1].mlp.down.weight = round_weight(weight, FOUR)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down\.weight .*than the mlp weights"):
        quantization_of(model)


def test_a_quantised_model_still_has_a_loss_and_gradients(model):
    tokens = torch.arange(24).view(2, 12)
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100
    quantize_(model.float(), "int8")
    loss = model.loss(tokens, targets)
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(20, 6), (20,)], ids=str)
def test_a_weight_without_a_form_is_held_once(shape):
    """Its rows come some at a time, and none stays beside the tensor that they go to."""
    whole = torch.randn(shape).bfloat16()
    seen = []

    def rows():
        for some in whole.split(7):
            assert all(part() is None for part in seen[:-1])  # the last one may still be in hand
            some = some.clone()
            seen.append(weakref.ref(some))
            yield some
            del some

    assert torch.equal(round_rows(shape, rows(), None), whole)
    assert len(seen) == 3
    assert round_rows(shape, [whole], None) is whole
    with pytest.raises(ShapeError, match=r"14 rows were given.*there must be 20"):
        round_rows(shape, whole.split(7)[:2], None)


# --- the demo model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def held_out(tokenizer) -> torch.Tensor:
    data = held_out_data(tokenizer, "combinations", 4096)
    return data.rows(range(len(data)))[0]


@torch.no_grad()
def log_probabilities(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(some).log_softmax(-1) for some in tokens.split(4)])


@pytest.fixture(scope="module")
def expected(held_out) -> torch.Tensor:
    return log_probabilities(Llama.from_pretrained(FOLDER, device="cpu"), held_out)


def divergence(expected: torch.Tensor, model: Llama, tokens: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of a token, in nats."""
    found = log_probabilities(model, tokens)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(("name", "most"), [("int8", 1e-3), ("int4", 3e-2)])
def test_the_demo_model_hardly_changes(name, most, held_out, expected):
    model = Llama.from_pretrained(FOLDER, device="cpu", quantize=name)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, QuantizedWeight)
    assert 1e-5 < divergence(expected, model, held_out) <= most

    other = quantize_(Llama.from_pretrained(FOLDER, device="cpu"), name)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMED)
def test_text_is_the_same_for_a_seed_whatever_the_threads(name, tokenizer):
    model = Llama.from_pretrained(FOLDER, device="cpu", quantize=name)
    before = torch.get_num_threads()
    texts, logits = set(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            (completion,) = generate(model, tokenizer, "Once upon", max_new_tokens=15, seed=3)
            texts.add(completion.text)
            logits.append(model(torch.arange(40).view(2, 20)))
    finally:
        torch.set_num_threads(before)
    assert len(texts) == 1
    if cpu.isas():  # torch's own products, which eager takes, may be split otherwise
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_form_of_each_kind_is_part_of_the_settings():
    fields = [field.name for field in dataclasses.fields(Quantization)]
    names = {
        "attention": "layers.3.attention.output.weight",
        "mlp": "layers.0.mlp.gate_up.weight",
        "embedding": "embed.weight",
        "head": "head.weight",
    }
    assert fields == list(names)
    for kind, name in names.items():
        only = Quantization(**{field: FOUR if field == kind else None for field in fields})
        assert [key for key in names.values() if only.of_weight(key)] == [name]
        assert only.of_weight("layers.0.attention_norm.weight") is None


def test_weights_are_rounded_into_memory_that_suits_them(monkeypatch):
    """Not copied there afterwards, when both copies would be held."""
    reserved = []

    def reserve(fresh: torch.Tensor) -> torch.Tensor:
        reserved.append(fresh.data_ptr())
        return fresh

    monkeypatch.setattr("llama_fast.ops.quantized_weight.reserve", reserve)
    weight = QuantizedWeight.from_float(torch.randn(40, 70), 4, 32, symmetric=False)
    buffers = dict(weight.named_buffers())
    assert list(buffers) == ["qdata", "scales", "minima"]
    assert [buffer.data_ptr() for buffer in buffers.values()] == reserved
