"""A config as Meta's params.json spells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .checks import called, check_number, check_size, need
from .rope_scaling import RopeScaling

if TYPE_CHECKING:
    from typing_extensions import Self

_META_ROPE_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_seq_len",
}


# What errors call a field that the file has not, or has under another name.
NAMES = {f"rope scaling {name}": key for key, name in _META_ROPE_KEYS.items()} | {
    "hidden_dim": "the feed-forward size from dim, ffn_dim_multiplier and multiple_of"
}


class MetaSpelling:
    """What gives `LlamaConfig` its `from_meta` and `to_meta`."""

    @classmethod
    @called(NAMES)
    def from_meta(cls, params: Mapping[str, Any], *, rope_factor: float | None = None) -> Self:
        """Read the dictionary of Meta's params.json.

        params.json says whether RoPE is scaled but not by how much: the factor is 32 for the
        shapes of 3.2 1B and 3B and 8 for all others; `rope_factor` overrides it. It does not say
        either whether the head is tied: true here for the shapes of 1B and 3B, and settled by the
        weights when there are any. Raises ConfigError for models that are not dense Llama 3 text
        models.
        """
        _refuse_other_meta_models(params)
        dim, n_layers = need(params, "dim"), need(params, "n_layers")
        n_heads = need(params, "n_heads")
        for name, size in (("dim", dim), ("n_layers", n_layers), ("n_heads", n_heads)):
            check_size(name, size)
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
            vocab_size=need(params, "vocab_size"),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 500000.0),
            rope_scaling=_rope_from_meta(params, rope_factor) if scaled else None,
            max_seq_len=params.get("max_seq_len", _meta_max_seq_len(scaled)),
            tied=_is_small_3_2(dim, n_layers),
            vocab_padding=params.get("vocab_padding", 0),
        )

    def to_meta(self) -> dict[str, Any]:
        """The dictionary of a params.json from which `from_meta` gives this configuration back.

        Published shapes use Meta's keys only. What those cannot express (another head dim,
        context length or rope scaling) is written under keys of our own that other readers do
        not know: head_dim, max_seq_len, vocab_padding, rope_scaling_factor, rope_low_freq_factor,
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
        if self.vocab_padding:
            params["vocab_padding"] = self.vocab_padding
        if scaling is not None:
            usual = RopeScaling(_meta_rope_factor(self.dim, self.n_layers))
            for key, name in _META_ROPE_KEYS.items():
                if getattr(scaling, name) != getattr(usual, name):
                    params[key] = getattr(scaling, name)
        return params


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
    check_size("multiple_of", multiple_of)
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        check_number("ffn_dim_multiplier", multiplier, minimum=0.0)
        check_number("ffn_dim_multiplier times the feed-forward size", multiplier * hidden)
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def _meta_hidden_spelling(dim: int, hidden_dim: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) that give hidden_dim back; Meta's own pairs first."""
    for pair in ((1.5, 256), (1.0, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096)):
        if _meta_hidden_dim(dim, *pair) == hidden_dim:
            return pair
    # The half keeps int() from losing one to the rounding of the product.
    return (hidden_dim + 0.5) / int(2 * (4 * dim) / 3), 1
