"""Folders of quantised weights: written, mapped, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast.checkpoint import (
    QuantizedCheckpoint,
    convert,
    open_checkpoint,
    quantized_bytes,
    write_hf,
    write_random,
)
from llama_fast.cli import main
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import NAMED, Quantization, WeightFormat
from llama_fast.demo import FOLDER
from llama_fast.errors import CheckpointError, ConfigError, LlamaFastError
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.model.quantized import quantization_of
from llama_fast.quantization.folder import quantize_folder
from llama_fast.tokenizer import Tokenizer
from tests import resident_memory
from tests.checkpoints import SMALL, random_state

MIXED = Quantization(WeightFormat(4, 64, False), WeightFormat(8, 128), None, WeightFormat(4, 32))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Float weights, the head apart."""
    folder = tmp_path_factory.mktemp("float") / "hf"
    write_hf(folder, SMALL, random_state(SMALL))
    return folder


@pytest.fixture
def folder(source, tmp_path) -> Path:
    quantize_folder(source, tmp_path / "int4", "int4")
    return tmp_path / "int4"


def same(a: Llama, b: Llama) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("settings", [*NAMED, MIXED], ids=str)
def test_a_folder_holds_what_quantising_gives(source, tmp_path, settings):
    quantize_folder(source, tmp_path / "out", settings)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert (checkpoint.config, checkpoint.dtype) == (SMALL, torch.bfloat16)
    assert checkpoint.quantization == Quantization.of(settings)
    assert checkpoint.format == "quantized"

    model = Llama.from_pretrained(tmp_path / "out", device="cpu")
    same(model, Llama.from_pretrained(source, device="cpu", quantize=settings))
    assert quantization_of(model) == Quantization.of(settings)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert 0 < size - quantized_bytes(SMALL, Quantization.of(settings)) < 10_000  # the header

    model.save_pretrained(tmp_path / "again")
    same(model, Llama.from_pretrained(tmp_path / "again", device="cpu"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_the_demo_model_from_a_folder_writes_the_same_text(tmp_path):
    quantize_folder(FOLDER, tmp_path / "demo", "int8")
    model = Llama.from_pretrained(tmp_path / "demo", device="cpu")
    assert model.head.weight is model.embed.weight
    tokenizer = Tokenizer.from_pretrained(tmp_path / "demo")
    assert tokenizer.stop_ids == Tokenizer.from_pretrained(FOLDER).stop_ids
    text = [
        generate(each, tokenizer, "Once upon a time", max_new_tokens=12, temperature=0)[0].text
        for each in (model, Llama.from_pretrained(FOLDER, device="cpu", quantize="int8"))
    ]
    assert text[0] == text[1]


def test_the_floats_can_change_their_dtype(source, tmp_path):
    quantize_folder(source, tmp_path / "out", "int4", dtype=torch.float32)
    model = Llama.from_pretrained(tmp_path / "out", device="cpu")
    assert model.dtype == model.norm.weight.dtype == torch.float32
    half = Llama.from_pretrained(tmp_path / "out", device="cpu", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half(torch.zeros(1, 2, dtype=torch.int64)).isfinite().all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_weights_are_mapped_and_aligned(folder):
    model = Llama.from_pretrained(folder, device="cpu")
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(folder / WEIGHTS))]
    (start, stop), *others = [(int(a, 16), int(b, 16)) for a, b in ranges]
    assert not others
    for name, tensor in model.state_dict().items():
        assert start <= tensor.data_ptr() < stop, f"{name} was copied"
        assert tensor.data_ptr() % 32 == 0


def test_writing_to_a_mapped_weight_leaves_the_file(folder):
    before = (folder / WEIGHTS).read_bytes()
    model = Llama.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        model.norm.weight.zero_()
    assert (folder / WEIGHTS).read_bytes() == before


# --- refusals ---------------------------------------------------------------------------------


def edit_config(folder: Path, **entry) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"].update(entry)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


QKV = "layers.0.attention.qkv.weight"


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def set_nan(tensors) -> None:
    tensors[QKV + ".scales"][0, 0, 3] = torch.nan


def set_infinity(tensors) -> None:
    tensors["norm.weight"][7] = -torch.inf


def change(name: str, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


DAMAGE = [
    ("truncated", truncate, "truncated or damaged"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    (
        "a key less",
        lambda f: edit_weights(f, lambda t: t.pop(QKV + ".scales")),
        rf"{QKV}\.scales is missing",
    ),
    (
        "a key more",
        lambda f: edit_weights(f, lambda t: t.update(bias=torch.zeros(3))),
        "bias is unknown",
    ),
    (
        "signed quantised values",
        lambda f: edit_weights(f, change(QKV + ".qdata", lambda t: t.view(torch.int8))),
        r"qkv\.weight\.qdata is I8",
    ),
    (
        "float32 scales",
        lambda f: edit_weights(f, change(QKV + ".scales", lambda t: t.float())),
        r"scales is torch\.float32 .*needs torch\.float16",
    ),
    (
        "integer norm",
        lambda f: edit_weights(f, change("norm.weight", lambda t: t.to(torch.int32))),
        r"norm\.weight is I32",
    ),
    (
        "other rows",
        lambda f: edit_weights(f, change(QKV + ".qdata", lambda t: t[1:])),
        r"qdata is torch\.uint8 \(7, 8, 16, 4\), but config\.json needs .*\(8, 8, 16, 4\)",
    ),
    ("NaN", lambda f: edit_weights(f, set_nan), r"qkv\.weight\.scales has values .*not finite"),
    ("infinity", lambda f: edit_weights(f, set_infinity), r"norm\.weight has values .*not finite"),
    (
        "another model",
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 96')
        ),
        "belongs to another model",
    ),
    ("a later version", lambda f: edit_config(f, version=4), "version is 4.*reads version 3"),
    ("no forms", lambda f: edit_config(f, weights=None), "attention, mlp, embedding, head"),
    (
        "wrong bits",
        lambda f: edit_config(f, weights={**NAMED["int4"].to_dict(), "mlp": {"bits": 5}}),
        "mlp is",
    ),
    (
        "other bits",
        lambda f: edit_config(f, weights=NAMED["int8"].to_dict()),
        r"qdata is torch\.uint8 .*needs",
    ),
]


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*d[1:], id=d[0]) for d in DAMAGE])
def test_a_damaged_folder_is_refused(folder, damage, says):
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError), match=says):
        Llama.from_pretrained(folder, device="cpu")


def test_quantising_twice_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"quantised already \(int4\); leave quantize out"):
        Llama.from_pretrained(folder, quantize="int8")
    with pytest.raises(ConfigError, match=r"quantised already \(int4\); give the folder"):
        quantize_folder(folder, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_converting_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantised \(int4\).*convert the folder"):
        convert(folder, tmp_path / "out", "meta")
    model = Llama.from_pretrained(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"quantised \(int4\), which Meta's format cannot hold"):
        model.save_pretrained(tmp_path / "out", format="meta")
    assert not (tmp_path / "out").exists()


def test_wrong_settings_and_existing_folders_are_refused_before_anything_is_read(source, tmp_path):
    with pytest.raises(ConfigError, match="quantize is 'int2'"):
        quantize_folder(source, tmp_path / "out", "int2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(LlamaFastError, match="not empty"):
        quantize_folder(source, tmp_path / "out", "int4")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_damaged_source_leaves_nothing(tmp_path):
    state = random_state(SMALL)
    state["norm.weight"][0] = torch.nan  # found when nearly all else is written
    write_hf(tmp_path / "hf", SMALL, state)
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_folder(tmp_path / "hf", tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_a_folder_that_the_others_know(run, tmp_path):
    target = tmp_path / "int4"
    code, _, err = run("quantize", FOLDER, target)
    assert code == 0 and "5 files, 1.23 MB" in err
    assert open_checkpoint(target).quantization == NAMED["int4"]
    code, out, _ = run("info", target)
    assert code == 0 and "stored as int4; norms and activations in bfloat16" in out
    code, out, err = run("generate", "Once upon a time", "-m", target, "-n", 5, "--temperature", 0)
    assert code == 0 and out.startswith(", there ") and "in int4, computing in" in err


def test_options_of_the_command_are_settings(run, source, tmp_path):
    options = ("--bits", 8, "--group-size", 128, "--offsets", "--head-bits", 16)
    assert run("quantize", source, tmp_path / "a", *options, "--dtype", "float32")[0] == 0
    form = WeightFormat(8, 128, symmetric=False)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.quantization == Quantization(form, form, None, None)
    assert checkpoint.dtype == torch.float32
    assert run("quantize", source, tmp_path / "b", "--bits", 8)[0] == 0
    assert open_checkpoint(tmp_path / "b").quantization == NAMED["int8"]
    for wrong, says in (
        (("--bits", 5), "5 is not 4 or 8. Write: --bits 4"),
        (("--head-bits", 2), "2 is not 4, 8 or 16. Write: --head-bits 8"),
    ):
        code, _, err = run("quantize", source, tmp_path / "c", *wrong)
        assert code == 2 and says in err
    code, _, err = run("quantize", source, tmp_path / "c", "--group-size", 40)
    assert code == 1 and "group_size of a quantised weight is 40" in err
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "hf")[0] == 1


# --- memory -----------------------------------------------------------------------------------

LARGE = LlamaConfig(
    dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, head_dim=64, hidden_dim=4096,
    vocab_size=32000, max_seq_len=256,
)  # fmt: skip
FLOATS = LARGE.n_params * 2  # 252 MB in bfloat16
LARGEST = LARGE.vocab_size * LARGE.dim * 2
# What torch allocates for itself, mapped pages between two releases and the chunks of rounding.
SLACK = 200e6

_WORK = """
from llama_fast.model import Llama
from llama_fast.quantization.folder import quantize_folder

def work(source, action):
    if action == "load":
        model = Llama.from_pretrained(source, device="cpu")
    elif action == "quantize":
        model = Llama.from_pretrained(source, device="cpu", quantize="int4")
    else:
        quantize_folder(source, action, "int4")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peaks_of_memory(tmp_path):
    floats, integers = tmp_path / "hf", tmp_path / "int4"
    write_random(floats, LARGE)
    write_random(tmp_path / "hf small", replace(SMALL, vocab_size=1024))
    asked = [(floats, integers), (floats, "quantize"), (integers, "load")]
    writing, quantizing, loading = resident_memory.peaks(_WORK, asked)
    final = quantized_bytes(LARGE, NAMED["int4"])
    assert LARGEST / 2 < writing < LARGEST * 1.6 + SLACK
    assert final < quantizing < final + LARGEST + SLACK
    assert loading < 60e6  # scales alone are looked at
