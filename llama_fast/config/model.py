"""The shape of a Llama 3 model, and its three spellings: ours, Hugging Face's and Meta's.

Legend of dims: H query heads, K KV heads, D head dim, C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..errors import ConfigError

# The largest size of one dimension: what a 32-bit index in a kernel can count.
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """The long-context scaling of Llama 3.1 and later (see `llama_fast.nn.rope`)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _check_number("rope scaling factor", self.factor, minimum=1.0)
        _check_number("rope scaling low_freq_factor", self.low_freq_factor)
        _check_number("rope scaling high_freq_factor", self.high_freq_factor)
        _check_size("rope scaling original_max_seq_len", self.original_max_seq_len)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling has low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; it needs 0 < low < high "
                "(Llama 3.1 has 1 and 4)"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the shapes and the mathematics of a Llama 3 text model.

    Raises ConfigError for values no model can have: sizes that are not positive integers, query
    heads that are not a multiple of the KV heads, an odd head dim, more parameters than a 64-bit
    size can count in bytes.
    """

    dim: int  # C
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # D
    hidden_dim: int  # F
    vocab_size: int  # V
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 8192
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                _check_size(field.name, getattr(self, field.name))
        _check_number("norm_eps", self.norm_eps, minimum=0.0)
        _check_number("rope_theta", self.rope_theta)
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be greater than 0")
        if not isinstance(self.tied, bool):
            raise ConfigError(f"tied is {self.tied!r}; it must be true or false")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                "each KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs, so it must be even"
            )
        if self.n_params * 8 >= 2**63:
            raise ConfigError(
                f"the sizes give {self.n_params:.3g} parameters, more than 64-bit sizes can "
                "address; check dim, hidden_dim, vocab_size and n_layers"
            )

    # --- what follows from the sizes --------------------------------------------------------

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        mlp = 3 * self.dim * self.hidden_dim
        layer = attention + mlp + 2 * self.dim
        vocabulary = self.vocab_size * self.dim * (1 if self.tied else 2)
        return vocabulary + self.n_layers * layer + self.dim

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of KV cache that one token of one sequence takes, over all layers. In torch.int8
        each head's vector has a float32 scale too."""
        scale = torch.float32.itemsize if dtype is torch.int8 else 0
        head = self.head_dim * dtype.itemsize + scale
        return 2 * self.n_layers * self.n_kv_heads * head

    def shortened(self, max_seq_len: int | None) -> LlamaConfig:
        """The same with a context of `max_seq_len` tokens (None: its own), for smaller tables and
        caches. Raises ConfigError for a longer one: the model was not made for it."""
        if max_seq_len is None:
            return self
        if max_seq_len > self.max_seq_len:
            raise ConfigError(
                f"max_seq_len={max_seq_len} was asked for; this model's context is "
                f"{self.max_seq_len} tokens"
            )
        return replace(self, max_seq_len=max_seq_len)

    # --- presets ----------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The configuration of a published model: "1b", "8b-3.1", "Llama-3.3-70B-Instruct", …

        A size alone means its first text release: 1b and 3b are 3.2, 8b and 70b are 3, 405b is
        3.1. Raises ConfigError for other names, listing those that exist.
        """
        key = _preset_key(name)
        if key not in PRESETS:
            raise ConfigError(
                f"there is no preset {name!r}; the presets are {', '.join(PRESETS)} "
                "(full names such as Llama-3.1-8B-Instruct work too)"
            )
        return PRESETS[key]

    # --- Hugging Face: config.json ----------------------------------------------------------

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the dictionary of a Hugging Face config.json (transformers 4 and 5 spellings).

        A key that is absent has transformers' default for it where that is harmless; the sizes
        themselves must be there. Raises ConfigError for another architecture, biases, another
        activation, quantised weights and rope types other than "default" and "llama3".
        """
        _refuse_other_hf_models(config)
        n_heads = _need(config, "num_attention_heads")
        dim = _need(config, "hidden_size")
        head_dim = config.get("head_dim")
        if head_dim is None:
            _check_size("num_attention_heads", n_heads)
            _check_size("hidden_size", dim)
            if dim % n_heads:
                raise ConfigError(
                    f"hidden_size={dim} is not a multiple of num_attention_heads={n_heads} "
                    "and there is no head_dim; add head_dim to the config"
                )
            head_dim = dim // n_heads
        n_kv_heads = config.get("num_key_value_heads")
        rope_theta, rope_scaling = _rope_from_hf(config)
        return cls(
            dim=dim,
            n_layers=_need(config, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            head_dim=head_dim,
            hidden_dim=_need(config, "intermediate_size"),
            vocab_size=_need(config, "vocab_size"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_seq_len=config.get("max_position_embeddings", 2048),
            tied=config.get("tie_word_embeddings", False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that transformers 4 and 5 both read.

        It says nothing of the weights' dtype and of special tokens: those belong to a checkpoint
        (see `llama_fast.checkpoint.write_hf`).
        """
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            },
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        }

    # --- Meta: params.json ------------------------------------------------------------------

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], *, rope_factor: float | None = None
    ) -> LlamaConfig:
        """Read the dictionary of Meta's params.json.

        params.json says whether RoPE is scaled but not by how much: the factor is 32 for the
        shapes of 3.2 1B and 3B and 8 for all others; `rope_factor` overrides it. It does not say
        either whether the head is tied: true here for the shapes of 1B and 3B, and settled by the
        weights when there are any. Raises ConfigError for models that are not dense Llama 3 text
        models.
        """
        _refuse_other_meta_models(params)
        dim, n_layers = _need(params, "dim"), _need(params, "n_layers")
        n_heads = _need(params, "n_heads")
        for name, size in (("dim", dim), ("n_layers", n_layers), ("n_heads", n_heads)):
            _check_size(name, size)
        head_dim = params.get("head_dim")
        if head_dim is None:
            if dim % n_heads:
                raise ConfigError(f"dim={dim} is not a multiple of n_heads={n_heads}")
            head_dim = dim // n_heads
        n_kv_heads = params.get("n_kv_heads")
        scaled = params.get("use_scaled_rope", False)
        if not isinstance(scaled, bool):
            raise ConfigError(f"use_scaled_rope is {scaled!r}; it must be true or false")
        if rope_factor is not None and not scaled:
            raise ConfigError(
                f"rope_factor={rope_factor} was given, but use_scaled_rope is not true in "
                "params.json: this model's RoPE is not scaled"
            )
        return cls(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            head_dim=head_dim,
            hidden_dim=_meta_hidden_dim(
                dim, params.get("ffn_dim_multiplier"), params.get("multiple_of", 256)
            ),
            vocab_size=_need(params, "vocab_size"),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 500000.0),
            rope_scaling=_rope_from_meta(params, rope_factor) if scaled else None,
            max_seq_len=params.get("max_seq_len", _meta_max_seq_len(scaled)),
            tied=_is_small_3_2(dim, n_layers),
        )

    def to_meta(self) -> dict[str, Any]:
        """The dictionary of a params.json from which `from_meta` gives this configuration back.

        Published shapes use Meta's keys only. What those cannot express (another head dim,
        context length or rope scaling) is written under keys of our own that other readers do
        not know: head_dim, max_seq_len, rope_scaling_factor, rope_low_freq_factor,
        rope_high_freq_factor, rope_original_max_seq_len.
        """
        multiplier, multiple_of = _meta_hidden_spelling(self.dim, self.hidden_dim)
        scaling = self.rope_scaling
        params: dict[str, Any] = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "ffn_dim_multiplier": multiplier,
            "multiple_of": multiple_of,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "use_scaled_rope": scaling is not None,
        }
        if self.head_dim * self.n_heads != self.dim:
            params["head_dim"] = self.head_dim
        if self.max_seq_len != _meta_max_seq_len(scaling is not None):
            params["max_seq_len"] = self.max_seq_len
        if scaling is not None:
            usual = RopeScaling(_meta_rope_factor(self.dim, self.n_layers))
            for key, name in _META_ROPE_KEYS.items():
                if getattr(scaling, name) != getattr(usual, name):
                    params[key] = getattr(scaling, name)
        return params


_META_ROPE_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_seq_len",
}


# --- checks ---------------------------------------------------------------------------------


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} is {value}; it must be between 1 and {MAX_SIZE}")


def _check_number(name: str, value: object, minimum: float = -math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")
    if value < minimum:
        raise ConfigError(f"{name} is {value}; it must be at least {minimum:g}")


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{key} is missing; a Llama config must have it")
    return config[key]


# --- Hugging Face ---------------------------------------------------------------------------


def _refuse_other_hf_models(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type", "llama")
    if model_type != "llama":
        raise ConfigError(
            f"model_type is {model_type!r}; only 'llama' models can be read (Llama 3, 3.1, 3.2 and "
            "3.3 text models)"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConfigError(f"{key} is {config[key]!r}; Llama 3 has no biases: it must be false")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act is {activation!r}; Llama 3 has 'silu'")
    if config.get("quantization_config"):
        raise ConfigError(
            "the config has a quantization_config; give the original float weights, which "
            "llama_fast can quantise itself"
        )


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling is {rope!r}; it must be an object or null")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor is {partial!r}; Llama 3 turns whole heads (1)")
    # 10000 is what transformers takes when a Llama config has no rope_theta at all.
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"the rope type is {kind!r}; known are 'default' and 'llama3' (Llama 3.1 and later)"
        )
    return theta, RopeScaling(
        factor=_need(rope, "factor"),
        low_freq_factor=_need(rope, "low_freq_factor"),
        high_freq_factor=_need(rope, "high_freq_factor"),
        original_max_seq_len=_need(rope, "original_max_position_embeddings"),
    )


# --- Meta -----------------------------------------------------------------------------------


def _refuse_other_meta_models(params: Mapping[str, Any]) -> None:
    for key in params:
        if key.startswith("vision_") or key in ("moe_args", "quantization_args", "lora_args"):
            raise ConfigError(
                f"params.json has {key}; only dense text models in float weights can be read "
                "(Llama 3, 3.1, 3.2 1B and 3B, 3.3)"
            )
    if params.get("vocab_size") == -1:
        raise ConfigError(
            "vocab_size is -1 (Llama 1 and 2 leave it to the tokenizer); write the number of "
            "rows of tok_embeddings.weight there"
        )


def _is_small_3_2(dim: int, n_layers: int) -> bool:
    """Whether this is the shape of Llama 3.2 1B or 3B."""
    return (dim, n_layers) in ((2048, 16), (3072, 28))


def _meta_rope_factor(dim: int, n_layers: int) -> float:
    return 32.0 if _is_small_3_2(dim, n_layers) else 8.0


def _meta_max_seq_len(scaled: bool) -> int:
    return 131072 if scaled else 8192


def _rope_from_meta(params: Mapping[str, Any], rope_factor: float | None) -> RopeScaling:
    given = {name: params[key] for key, name in _META_ROPE_KEYS.items() if params.get(key)}
    given.setdefault("factor", _meta_rope_factor(params["dim"], params["n_layers"]))
    if rope_factor is not None:
        given["factor"] = rope_factor
    return RopeScaling(**given)


def _meta_hidden_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's feed-forward size: 2/3 of 4·dim, times the multiplier, up to a multiple."""
    _check_size("multiple_of", multiple_of)
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        _check_number("ffn_dim_multiplier", multiplier, minimum=0.0)
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def _meta_hidden_spelling(dim: int, hidden_dim: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) that give hidden_dim back; Meta's own pairs first."""
    for pair in ((1.5, 256), (1.0, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096)):
        if _meta_hidden_dim(dim, *pair) == hidden_dim:
            return pair
    # The half keeps int() from losing one to the rounding of the product.
    return (hidden_dim + 0.5) / int(2 * (4 * dim) / 3), 1


# --- presets --------------------------------------------------------------------------------


def _llama3(
    dim: int, n_layers: int, n_heads: int, head_dim: int, hidden_dim: int, **more: Any
) -> LlamaConfig:
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=128256,
        **more,
    )


_SCALED_8 = {"rope_scaling": RopeScaling(8.0), "max_seq_len": 131072}
_SCALED_32 = {"rope_scaling": RopeScaling(32.0), "max_seq_len": 131072}

PRESETS: dict[str, LlamaConfig] = {
    "1b": _llama3(2048, 16, 32, 64, 8192, tied=True, **_SCALED_32),
    "3b": _llama3(3072, 28, 24, 128, 8192, tied=True, **_SCALED_32),
    "8b": _llama3(4096, 32, 32, 128, 14336),
    "8b-3.1": _llama3(4096, 32, 32, 128, 14336, **_SCALED_8),
    "70b": _llama3(8192, 80, 64, 128, 28672),
    "70b-3.1": _llama3(8192, 80, 64, 128, 28672, **_SCALED_8),
    "405b": _llama3(16384, 126, 128, 128, 53248, **_SCALED_8),
}

# Releases whose name differs from their row's: size and version → row.
_SAME_SHAPE = {
    "1b-3.2": "1b",
    "3b-3.2": "3b",
    "8b-3": "8b",
    "70b-3": "70b",
    "70b-3.3": "70b-3.1",
    "405b-3.1": "405b",
}


def _preset_key(name: str) -> str:
    """The row of PRESETS that a name means, in whatever order it gives version and size."""
    text = re.sub(r"^meta-|-instruct$", "", name.strip().lower().replace("_", "-"))
    text = re.sub(r"^llama-?", "", text)
    match = re.fullmatch(r"(?:(3(?:\.\d)?)-)?(\d+b)(?:-(3(?:\.\d)?))?", text)
    if not match or (match[1] and match[3]):
        return text
    version = (match[1] or match[3] or "").removesuffix(".0")
    key = f"{match[2]}-{version}" if version else match[2]
    return _SAME_SHAPE.get(key, key)
