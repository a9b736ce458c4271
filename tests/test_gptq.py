"""Rounding that makes up for its errors, and the report that shows what it gains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llama_fast.checkpoint import open_checkpoint, write_hf
from llama_fast.cli import main
from llama_fast.cli.quantize import REPORT
from llama_fast.config.quantization import NAMED, Quantization, WeightFormat
from llama_fast.demo import FOLDER
from llama_fast.errors import ConfigError, ShapeError
from llama_fast.model import Llama
from llama_fast.ops import QuantizedWeight
from llama_fast.ops.quantized_weight import round_weight
from llama_fast.quantization.folder import layers, quantize_folder
from llama_fast.quantization.gptq import round_compensated
from llama_fast.quantization.report import compare
from llama_fast.tokenizer import Tokenizer
from llama_fast.training.blocks import PackedDataset
from tests.checkpoints import SMALL, random_state
from tools.demo_model.recipe import BLOCK, held_out_data
from tools.demo_model.texts import documents

FORMS = [WeightFormat(4, 32), WeightFormat(4, 64, False), WeightFormat(8, 128)]


def weight_and_inputs(C_in: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that depend on each other, as those of a model do."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(C_in, C_in, generator=g) * torch.logspace(0, -2, C_in)
    return torch.randn(40, C_in, generator=g), torch.randn(1000, C_in, generator=g) @ mixing.t()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_change_less_than_by_the_nearest_codes(form):
    weight, x = weight_and_inputs()
    found = round_compensated(weight, x.t() @ x, form)
    assert (found.shape, found.bits, found.symmetric) == ((40, 150), form.bits, form.symmetric)

    def error(rounded) -> float:
        return float((x @ (rounded.dequantize() - weight).t()).square().mean().sqrt())

    assert error(found) < 0.7 * error(round_weight(weight, form))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_of_independent_inputs_the_nearest_codes_are_the_best(form):
    weight, _ = weight_and_inputs()
    found = round_compensated(weight, 3 * torch.eye(150), form)
    expected = round_weight(weight, form)
    for a, b in zip(found.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [32, 128])
def test_large_inputs_are_rounded_first_and_stored_in_their_place(size):
    """A channel that stands out is rounded before the others have changed it; so its quantised
    values are the nearest ones of its own weights, wherever in the matrix it lies."""
    weight, x = weight_and_inputs()
    x[:, 140] = 100 * x[:, 140:].sum(1) + x[:, 0]
    form = WeightFormat(4, size)
    found = round_compensated(weight, x.t() @ x, form).dequantize()
    expected = round_weight(weight, form).dequantize()
    first = slice(140 // size * size, None)
    assert torch.equal(found[:, 140], expected[:, 140])
    assert not torch.equal(found[:, first], expected[:, first])
    assert not torch.equal(found[:, 0], expected[:, 0])


def test_inputs_that_are_not_finite_are_refused():
    weight, x = weight_and_inputs()
    x[3, 7] = float("inf")
    with pytest.raises(ShapeError, match="activations of the model that are not finite"):
        round_compensated(weight, x.t() @ x, FORMS[0])


def test_inputs_that_are_always_zero_or_too_few():
    weight, x = weight_and_inputs()
    x = x[:10].clone()
    x[:, 50:60] = 0
    found = round_compensated(weight, x.t() @ x, FORMS[0])
    assert found.dequantize().isfinite().all()
    assert torch.isfinite(round_compensated(weight, torch.zeros(150, 150), FORMS[0]).scales).all()


# --- a folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    data = held_out_data(Tokenizer.from_pretrained(FOLDER), "combinations", 4096)
    return data.rows(range(len(data)))[0]


@pytest.fixture(scope="module")
def calibration() -> torch.Tensor:
    """A text of the same world that neither training nor the held-out texts contain."""
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    data = PackedDataset.from_texts(documents(3, "seed"), tokenizer, BLOCK, n_tokens=4096)
    return data.rows(range(len(data)))[0]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, calibration) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "int4"
    quantize_folder(FOLDER, folder, "int4", calibration=calibration)
    return folder


def test_calibration_brings_the_model_closer(calibrated, held_out):
    demo = open_checkpoint(FOLDER)
    nearest = Llama.from_pretrained(FOLDER, device="cpu", quantize="int4")
    before = compare(demo, nearest, held_out)
    after = compare(demo, Llama.from_pretrained(calibrated, device="cpu"), held_out)
    assert after.quantized.divergence < 0.8 * before.quantized.divergence <= 0.8 * 3e-2
    outputs = [sum(error.outputs for error in report.weights) for report in (after, before)]
    assert outputs[0] < outputs[1]
    floats = Llama.from_pretrained(FOLDER, device="cpu").state_dict()
    state = Llama.from_pretrained(calibrated, device="cpu").state_dict()
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, floats[name])


def test_calibration_gives_the_same_again(calibrated, calibration, tmp_path):
    quantize_folder(FOLDER, tmp_path / "again", "int4", calibration=calibration)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (calibrated / name).read_bytes()


@torch.no_grad()
def test_an_untied_model_and_kinds_that_stay(tmp_path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    settings = Quantization(None, WeightFormat(4, 32), None, WeightFormat(8, 64))
    tokens = torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(0))
    quantize_folder(tmp_path / "hf", tmp_path / "out", settings, calibration=tokens)
    model = Llama.from_pretrained(tmp_path / "out", device="cpu")
    floats = Llama.from_pretrained(tmp_path / "hf", device="cpu")
    assert torch.equal(model.embed.weight, floats.embed.weight)
    found = []
    floats.head.register_forward_pre_hook(lambda module, args: found.append(args[0].float()))
    floats(tokens)
    x, weight = found[0].flatten(0, 1), floats.head.weight.float()

    def error(head: QuantizedWeight) -> float:
        return float((x @ (head.dequantize() - weight).t()).square().mean())

    assert error(model.head.weight) < 0.8 * error(round_weight(weight, WeightFormat(8, 64)))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(2, 600, dtype=torch.int64), "rows of 600 tokens.*context of 512"),
        (torch.full((1, 9), 2304), "ids 2304 to 2304.*ids below 2304"),
        (torch.full((1, 9), -1), "ids -1 to -1"),
        (torch.zeros(9), r"float32 \(9,\); they must be torch.int64 \(B,T\)"),
        (torch.zeros(0, 4, dtype=torch.int64), "not empty"),
    ],
)
def test_tokens_that_are_no_text_are_refused(tmp_path, tokens, says):
    with pytest.raises(ConfigError, match=says):
        quantize_folder(FOLDER, tmp_path / "out", "int4", calibration=tokens)
    assert not any(tmp_path.iterdir())


# --- the report -------------------------------------------------------------------------------


def test_layers_come_one_at_a_time():
    floats = Llama.from_pretrained(FOLDER, device="cpu").state_dict()
    seen, last = [], None
    for part, module in layers(open_checkpoint(FOLDER)):
        seen.append(part)
        assert last is None or all(p.is_meta for p in last.parameters())
        for name, parameter in module.named_parameters(part):
            assert torch.equal(parameter, floats[name])
        last = None if part == "embed" else module
    assert seen == ["embed", *(f"layers.{i}" for i in range(4)), "norm", "head"]


@torch.no_grad()
def test_the_report_is_what_the_models_say(held_out):
    model = Llama.from_pretrained(FOLDER, device="cpu")
    quantized = Llama.from_pretrained(FOLDER, device="cpu", quantize="int4")
    tokens = held_out[:3]
    report = compare(open_checkpoint(FOLDER), quantized, tokens)
    targets = tokens[:, 1:, None]

    def read(reader: Llama, kv_cache: bool) -> torch.Tensor:
        cache = reader.new_cache(*tokens.shape, "int8") if kv_cache else None
        return reader(tokens, cache=cache).log_softmax(-1)[:, :-1]

    exact = read(model, False)
    assert report.tokens == targets.numel()
    assert report.perplexity == pytest.approx(math.exp(-exact.gather(-1, targets).mean()), 1e-3)
    for predictions, found in (
        (report.quantized, read(quantized, False)),
        (report.kv_cache, read(model, True)),
        (report.both, read(quantized, True)),
    ):
        kl = (exact.exp() * (exact - found)).sum(-1)
        perplexity = math.exp(-found.gather(-1, targets).mean())
        assert predictions.perplexity == pytest.approx(perplexity, 1e-3)
        assert predictions.divergence == pytest.approx(float(kl.mean()), rel=0.02)
        assert predictions.divergence_largest == pytest.approx(float(kl.max()), rel=0.1)
        assert 0.9 < predictions.top1_agreement < 1
    assert 0 < report.kv_cache.divergence < 0.1 * report.quantized.divergence

    weights = {error.name: error for error in report.weights}
    assert len(weights) == len(report.weights) == 1 + 4 * 4 and len(report.layers) == 4
    name = "layers.2.mlp.down.weight"
    exact = model.layers[2].mlp.down.weight.detach().float()
    expected = (quantized.layers[2].mlp.down.weight.dequantize() - exact).norm() / exact.norm()
    assert weights[name].weights == pytest.approx(float(expected), rel=1e-4)
    assert 0.3 * weights[name].weights < weights[name].outputs < 1.5 * weights[name].weights
    assert (weights[name].bits, weights["embed.weight"].bits) == (4, 4)


def test_of_a_model_beside_itself_nothing_is_reported(held_out):
    report = compare(
        open_checkpoint(FOLDER), Llama.from_pretrained(FOLDER, device="cpu"), held_out[:1]
    )
    assert report.weights == [] and report.layers == [0.0] * 4
    assert report.quantized.divergence == 0 and report.quantized.top1_agreement == 1
    assert report.kv_cache == report.both and 0 < report.both.divergence < 2e-4


def test_the_command_reports(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("\n\n".join(text for text, _ in zip(documents(3), range(40), strict=False)))
    kinds = {"int8": ("--bits", "8"), "int4": ()}
    most = {"int8": 1e-3, "int4": 3e-2}
    for name, options in kinds.items():
        folder = tmp_path / name
        assert main(["quantize", str(FOLDER), str(folder), "--report", *options]) == 0
        out, _ = capsys.readouterr()
        found = json.loads((folder / REPORT).read_text())
        assert f"{found['perplexity']:.4f}" in out
        for changed in ("quantized", "kv_cache", "both"):
            assert f"{found[changed]['divergence']:.2e}" in out
            assert f"{found[changed]['perplexity']:.4f}" in out
        last = found["weights"][-1]
        assert last["name"] in out and f"{last['weights']:.3%}" in out
        assert f"{found['layers'][-1]:.3%}" in out
        assert 1e-5 < found["quantized"]["divergence"] <= most[name]
        assert 1e-5 < found["kv_cache"]["divergence"] <= 1e-3
        assert NAMED[name].mlp.bits == last["bits"]
    options = ["--calibrate", str(text), "--report", "--text", str(text)]
    assert main(["quantize", str(FOLDER), str(tmp_path / "c"), *options]) == 0
    found = json.loads((tmp_path / "c" / REPORT).read_text())
    assert found["quantized"]["divergence"] < 3e-2


def test_texts_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "short").write_text("a")
    out = tmp_path / "out"
    for options, code, says in (
        (("--text", tmp_path / "short"), 2, "Write: --report --text "),
        (("--calibrate", tmp_path / "latin"), 1, "latin is not UTF-8 (byte 3)"),
        (("--report", "--text", tmp_path / "short"), 1, "the text has 1 tokens"),
        (("--calibrate", tmp_path / "none"), 2, "does not exist"),
    ):
        assert main(["quantize", str(FOLDER), str(out), *map(str, options)]) == code
        assert says in " ".join(capsys.readouterr().err.split())
        assert not out.exists()
