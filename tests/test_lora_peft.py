"""Adapters against PEFT's: ours → PEFT → ours, of every kind, on tied and untied models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast.checkpoint.adapter import SETTINGS, WEIGHTS
from llama_fast.errors import CheckpointError, ConfigError
from llama_fast.model import Llama
from llama_fast.training.adapter import Adapter, load_adapter, lora

from . import hf_models

peft = pytest.importorskip("peft", reason="needs peft: pip install peft", exc_type=ImportError)

IDS = hf_models.tokens(2, 12)
NEW = [250, 3, 77]
KINDS = {
    "all": {},
    "rslora": {"rslora": True, "alpha": 7.0},
    "dora": {"dora": True},
    "some of qkv": {"targets": ["k_proj", "down_proj"]},
    "regex": {"targets": r"model\.layers\.[1]\.(mlp\.up_proj|self_attn\.[qv]_proj)"},
    "patterns": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"v_proj": 64.0, r"1\.self_attn\.k_proj": 5.0},
    },
    "dora with patterns": {"dora": True, "rank_pattern": {"k_proj": 7}},
    "rows": {"targets": ["q_proj"], "rows": NEW},
    "rows and dora": {"dora": True, "rows": NEW},
    "embedding": {"targets": ["v_proj", "embed_tokens"]},
    "head": {"targets": ["v_proj", "lm_head"]},
    "whole embedding": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "whole embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    hf_models.model(tie_word_embeddings=request.param).save_pretrained(path)
    return path


def ours(folder: Path) -> Llama:
    return Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)


def theirs(folder: Path) -> torch.nn.Module:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def filled(adapter: Adapter) -> Adapter:
    """Values that no zero and no default hides."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise) if name.endswith("weight") else parameter.mul_(0.5).add_(noise)
    return adapter


def in_peft(folder: Path, saved: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings(
            "ignore", message=".*[Uu]nable to fetch.*|.*Could not find a config.*"
        )
        return peft.PeftModel.from_pretrained(theirs(folder), saved).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(IDS)
    return getattr(found, "logits", found)


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_peft_to_ours(folder, kind, tmp_path):
    model = ours(folder)
    plain = logits(model)
    adapter = filled(lora(model, **{"rank": 4, "alpha": 8} | KINDS[kind]))
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-3
    adapter.save(tmp_path / "ours")

    other = in_peft(folder, tmp_path / "ours")
    close(logits(other), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "theirs")

    again = ours(folder)
    back = load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), expected)
    for name, tensor in adapter.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name

    tied = model.config.tied
    adapter.merge()
    close(logits(model), expected)
    # PEFT's merge of one half of a tied pair changes the other half too.
    if not (tied and kind in ("embedding", "head", "whole embedding", "whole embedding and head")):
        close(logits(other.merge_and_unload()), expected)
    model.save_pretrained(tmp_path / "merged")
    close(logits(theirs(tmp_path / "merged")), expected)

    back.unload()
    assert torch.equal(logits(again), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4, 9]}},
        {"target_modules": ["q_proj"],
         "trainable_token_indices": {"embed_tokens": [4, 9], "lm_head": [4, 7, 9]}},
        {"target_modules": ["q_proj"], "use_dora": True, "lora_dropout": 0.1, "r": 3},
    ],
    ids=str,
)  # fmt: skip
def test_theirs_to_ours(folder, settings, tmp_path):
    torch.manual_seed(8)
    config = peft.LoraConfig(
        **{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(theirs(folder), config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1)
    expected = logits(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "theirs")
    model = ours(folder)
    adapter = load_adapter(model, tmp_path / "theirs")
    close(logits(model), expected)
    adapter.merge()
    close(logits(model), expected)


def changed(folder: Path, tmp_path: Path, **settings) -> Path:
    """An adapter that is saved, with other settings in its file."""
    adapter = lora(ours(folder), 4, targets=["q_proj", "v_proj"])
    adapter.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"lora_bias": True}, "trains biases"),
        ({"bias": "all"}, "trains biases"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"some_new_variant": {"a": 1}}, "some_new_variant is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": "8"}, "the rank is '8'"),
        ({"r": 0}, "the rank is 0"),
        ({"target_modules": 5}, "malformed"),
        ({"target_modules": "q_proj("}, "no regular expression"),
        ({"target_modules": ["q_proj", "v_proj", "query"]}, "has no module 'query'"),
        ({"trainable_token_indices": [257]}, "rows 257 to 257"),
        ({"modules_to_save": ["o_proj"]}, "offered for embed_tokens"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(folder, tmp_path, settings, message):
    path = changed(folder, tmp_path, **settings)
    with pytest.raises(ConfigError, match=message) as error:
        load_adapter(ours(folder), path)
    assert SETTINGS in str(error.value)


def test_tensors_that_do_not_fit_are_refused(folder, tmp_path):
    path = changed(folder, tmp_path)
    tensors = load_file(path / WEIGHTS)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(message, **changes):
        wrong = {k: v for k, v in (tensors | changes).items() if v is not None}
        save_file(wrong, path / WEIGHTS, metadata={"format": "pt"})
        model = ours(folder)
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, path)
        assert {name: id(module) for name, module in model.named_modules()} == before

    refused(r"q_proj\.lora_A\.weight is missing", **{first: None})
    refused("unknown", **{first.replace("q_proj", "o_proj"): tensors[first].clone()})
    refused("has shape", **{first: tensors[first][:2].clone()})
    refused("not finite", **{first: tensors[first] * float("nan")})
    refused("stored as", **{first: tensors[first].to(torch.int32)})
    (path / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(ours(folder), path)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_adapter(ours(folder), path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(ours(folder), folder)
