"""A config as Hugging Face's config.json spells it, for transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .checks import called, check_number, check_size, need
from .rope_scaling import RopeScaling

if TYPE_CHECKING:
    from typing_extensions import Self


# Checked by their own names, which are those in the file.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


# Our fields by the names that they have in the file.
NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "original_max_seq_len": "original_max_position_embeddings",
    "tied": "tie_word_embeddings",
}


class HuggingFaceSpelling:
    """What gives `LlamaConfig` its `from_hf` and `to_hf`."""

    @classmethod
    @called(NAMES)
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the dictionary of a Hugging Face config.json (transformers 4 and 5 spellings).

        A key that is absent has transformers' default for it where that is harmless; the sizes
        themselves must be there. Raises ConfigError for another architecture, biases, another
        activation, quantised weights and rope types other than "default" and "llama3".
        """
        _refuse_other_hf_models(config)
        for key in SIZES:
            if config.get(key) is not None:
                check_size(key, config[key])
        check_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), minimum=0.0)
        n_heads = need(config, "num_attention_heads")
        dim = need(config, "hidden_size")
        head_dim = config.get("head_dim")
        if head_dim is None:
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
            n_layers=need(config, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            head_dim=head_dim,
            hidden_dim=need(config, "intermediate_size"),
            vocab_size=need(config, "vocab_size"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_seq_len=config.get("max_position_embeddings", 2048),
            tied=config.get("tie_word_embeddings", False),
            vocab_padding=config.get("vocab_padding", 0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that transformers 4 and 5 both read.

        It says nothing of the weights' dtype and of special tokens: those belong to a checkpoint
        (see `llama_fast.checkpoint.write_hf`). vocab_padding is a key of our own, written where
        there is padding; other readers keep it and do not know it.
        """
        scaling = self.rope_scaling
        padding = {"vocab_padding": self.vocab_padding} if self.vocab_padding else {}
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
            **padding,
        }


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
        factor=need(rope, "factor"),
        low_freq_factor=need(rope, "low_freq_factor"),
        high_freq_factor=need(rope, "high_freq_factor"),
        original_max_seq_len=need(rope, "original_max_position_embeddings"),
    )
