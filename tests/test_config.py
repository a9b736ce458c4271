"""LlamaConfig: the published shapes, and the config files of both formats."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama_fast.config import PRESETS, LlamaConfig, RopeScaling
from llama_fast.errors import ConfigError

# FACTS, section 2: dim, layers, heads, KV heads, hidden, head dim, parameters, KV bytes per token.
PUBLISHED = {
    "1b": (2048, 16, 32, 8, 8192, 64, 1_235_814_400, 32_768),
    "3b": (3072, 28, 24, 8, 8192, 128, 3_212_749_824, 114_688),
    "8b": (4096, 32, 32, 8, 14336, 128, 8_030_261_248, 131_072),
    "8b-3.1": (4096, 32, 32, 8, 14336, 128, 8_030_261_248, 131_072),
    "70b": (8192, 80, 64, 8, 28672, 128, 70_553_706_496, 327_680),
    "70b-3.1": (8192, 80, 64, 8, 28672, 128, 70_553_706_496, 327_680),
    "405b": (16384, 126, 128, 8, 53248, 128, 405_853_388_800, 516_096),
}

# Meta's params.json of each (the same section).
_KEYS = ("dim", "n_layers", "n_heads", "ffn_dim_multiplier", "multiple_of")
PARAMS = {
    "1b": dict(zip(_KEYS, (2048, 16, 32, 1.5, 256), strict=True)),
    "3b": dict(zip(_KEYS, (3072, 28, 24, 1.0, 256), strict=True)),
    "8b": dict(zip(_KEYS, (4096, 32, 32, 1.3, 1024), strict=True)),
    "70b": dict(zip(_KEYS, (8192, 80, 64, 1.3, 4096), strict=True)),
    "405b": dict(zip(_KEYS, (16384, 126, 128, 1.2, 4096), strict=True)),
}
COMMON = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}

SMALL = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=172, vocab_size=320
)
# What Llama-3.1-8B's config.json says, in transformers 4's spelling.
HF_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    dim, layers, heads, kv_heads, hidden, head_dim, n_params, kv_bytes = PUBLISHED[name]
    config = LlamaConfig.preset(name)
    assert (config.dim, config.n_layers, config.n_heads) == (dim, layers, heads)
    assert (config.n_kv_heads, config.hidden_dim, config.head_dim) == (kv_heads, hidden, head_dim)
    assert config.n_params == n_params
    assert config.kv_bytes_per_token() == kv_bytes
    assert config.kv_bytes_per_token(torch.float32) == 2 * kv_bytes
    scales = 2 * config.n_layers * config.n_kv_heads * 4
    assert config.kv_bytes_per_token(torch.int8) == kv_bytes / 2 + scales
    assert config.tied == (name in ("1b", "3b"))
    assert (config.norm_eps, config.rope_theta, config.vocab_size) == (1e-5, 500000.0, 128256)


def test_every_preset_is_in_the_table_of_shapes():
    assert set(PUBLISHED) == set(PRESETS)


def test_scaling_and_context_of_the_releases():
    for name in ("8b", "70b"):
        assert (PRESETS[name].rope_scaling, PRESETS[name].max_seq_len) == (None, 8192)
    for name, factor in {"1b": 32, "3b": 32, "8b-3.1": 8, "70b-3.1": 8, "405b": 8}.items():
        assert PRESETS[name].rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
        assert PRESETS[name].max_seq_len == 131072


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("Llama-3.2-1B", "1b"),
        ("meta-llama-3-8b-instruct", "8b"),
        ("Meta-Llama-3.1-8B", "8b-3.1"),
        ("Llama-3.1-8B-Instruct", "8b-3.1"),
        ("llama3.1-8b", "8b-3.1"),
        ("8B-3.0", "8b"),
        ("70b-3.3", "70b-3.1"),
        ("Llama-3.3-70B-Instruct", "70b-3.1"),
        ("3.1-405b", "405b"),
        ("3b-3.2", "3b"),
    ],
)
def test_preset_aliases(name, row):
    assert LlamaConfig.preset(name) is PRESETS[row]


@pytest.mark.parametrize("name", ["7b", "8b-3.2", "1b-3.1", "gpt2", "", "3.1-8b-3.1"])
def test_unknown_preset_lists_the_presets(name):
    with pytest.raises(ConfigError, match=r"the presets are 1b, 3b, 8b, 8b-3\.1"):
        LlamaConfig.preset(name)


# --- Meta -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMS)
def test_from_meta_published(name):
    scaled = name in ("1b", "3b", "405b")
    params = {**COMMON, **PARAMS[name]} | ({"use_scaled_rope": True} if scaled else {})
    assert LlamaConfig.from_meta(params) == PRESETS[name]
    if not scaled:
        assert LlamaConfig.from_meta({**params, "use_scaled_rope": False}) == PRESETS[name]
        if name != "405b":
            assert (
                LlamaConfig.from_meta({**params, "use_scaled_rope": True}) == PRESETS[f"{name}-3.1"]
            )


@pytest.mark.parametrize("name", PARAMS)
def test_to_meta_writes_metas_own_keys(name):
    params = PRESETS[name].to_meta()
    expected = {**COMMON, **PARAMS[name], "use_scaled_rope": name in ("1b", "3b", "405b")}
    assert params == expected


def test_rope_factor_override():
    params = {**COMMON, **PARAMS["1b"], "use_scaled_rope": True}
    assert LlamaConfig.from_meta(params, rope_factor=8).rope_scaling == RopeScaling(8)
    with pytest.raises(ConfigError, match=r"rope_factor=8.*use_scaled_rope"):
        LlamaConfig.from_meta({**params, "use_scaled_rope": False}, rope_factor=8)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, hidden_dim=171, max_seq_len=512, head_dim=24),
        dataclasses.replace(SMALL, hidden_dim=1, dim=2, n_heads=2, n_kv_heads=1),
        dataclasses.replace(SMALL, rope_scaling=RopeScaling(4.0, 2.0, 5.0, 128), max_seq_len=512),
        dataclasses.replace(SMALL, rope_scaling=RopeScaling(8.0), max_seq_len=131072),
        dataclasses.replace(PRESETS["1b"], rope_scaling=RopeScaling(8.0)),
        *PRESETS.values(),
    ],
)
def test_round_trips(config):
    assert LlamaConfig.from_meta(config.to_meta()) == config
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_every_hidden_size_survives_metas_formula():
    for dim in (64, 100, 4096):
        for hidden in range(dim, 4 * dim, 7):
            config = dataclasses.replace(SMALL, dim=dim, hidden_dim=hidden)
            assert LlamaConfig.from_meta(config.to_meta()).hidden_dim == hidden


def test_from_meta_defaults():
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 320}
    config = LlamaConfig.from_meta(params)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (4, 16, 256)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 500000.0, None)


# --- Hugging Face ---------------------------------------------------------------------------


def test_from_hf_published():
    assert LlamaConfig.from_hf(HF_8B) == PRESETS["8b-3.1"]


def test_from_hf_spellings_of_rope():
    old = dict(HF_8B)
    scaling = old.pop("rope_scaling")
    theta = old.pop("rope_theta")
    by_type = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": "llama3"}
    for extra in (
        {"rope_scaling": by_type, "rope_theta": theta},
        {"rope_parameters": {**scaling, "rope_theta": theta}},
        {"rope_parameters": {**scaling, "rope_theta": theta}, "rope_scaling": None},
        {"rope_parameters": scaling, "rope_theta": theta},
    ):
        assert LlamaConfig.from_hf({**old, **extra}) == PRESETS["8b-3.1"], extra
    for extra in (
        {"rope_scaling": None, "rope_theta": theta},
        {"rope_theta": theta},
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta}},
    ):
        config = LlamaConfig.from_hf({**old, **extra})
        assert (config.rope_scaling, config.rope_theta) == (None, theta), extra


def test_from_hf_matches_transformers_on_what_is_absent():
    transformers = pytest.importorskip("transformers", reason="compares with its defaults")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    theirs = transformers.LlamaConfig(**sizes)
    ours = LlamaConfig.from_hf(sizes)
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    if hasattr(theirs, "rope_parameters"):
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert LlamaConfig.from_hf(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"max_position_embeddings": 0.5}, "max_position_embeddings is 0.5"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"vocab_size": "128256"}, "vocab_size is '128256'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 4100}, "not a multiple of num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_from_hf_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf({**HF_8B, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": 30}, "not a multiple of n_heads=30"),
        ({"vocab_size": -1}, "vocab_size is -1.*tok_embeddings"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
        ({"moe_args": {}}, "moe_args"),
        ({"vision_chunk_size": 448}, "vision_chunk_size"),
        ({"quantization_args": {}}, "quantization_args"),
    ],
)
def test_from_meta_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_meta({**COMMON, **PARAMS["8b"], **change})


# --- impossible values ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": -64}, "dim is -64"),
        ({"dim": 2**40}, "dim is 1099511627776"),
        ({"n_heads": 3}, "n_heads=3 is not a multiple of n_kv_heads=2"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"n_layers": 2.0}, "n_layers is 2.0"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"dim": 2**31 - 1, "hidden_dim": 2**31 - 1}, "more than 64-bit sizes"),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "values", [(0.5,), (8.0, 4.0, 4.0), (8.0, 0.0, 4.0), (8.0, 1.0, 4.0, 0), (float("nan"),)]
)
def test_impossible_scaling(values):
    with pytest.raises(ConfigError, match="rope scaling"):
        RopeScaling(*values)
