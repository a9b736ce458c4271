"""The shape of a Llama 3 model.

Legend of dims: H query heads, K KV heads, D head dim, C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from ..errors import ConfigError
from .checks import check_number, check_size
from .hf import HuggingFaceSpelling
from .meta import MetaSpelling
from .presets import SIZES, preset_key
from .rope_scaling import RopeScaling


@dataclass(frozen=True)
class LlamaConfig(HuggingFaceSpelling, MetaSpelling):
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
    vocab_padding: int = 0  # rows at the vocabulary's end that are no token's

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and field.name != "vocab_padding":
                check_size(field.name, getattr(self, field.name))
        check_number("norm_eps", self.norm_eps, minimum=0.0)
        check_number("rope_theta", self.rope_theta)
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be greater than 0")
        padding = self.vocab_padding
        if type(padding) is not int or not 0 <= padding < self.vocab_size:
            raise ConfigError(
                f"vocab_padding is {padding!r}; it must be a whole number from 0 to less than "
                f"vocab_size={self.vocab_size}: the rows that are no token's"
            )
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
        check_size("max_seq_len", max_seq_len)
        if max_seq_len > self.max_seq_len:
            raise ConfigError(
                f"max_seq_len={max_seq_len} was asked for; this model's context is "
                f"{self.max_seq_len} tokens"
            )
        return replace(self, max_seq_len=max_seq_len)

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The configuration of a published model: "1b", "8b-3.1", "Llama-3.3-70B-Instruct", …

        A size alone means its first text release: 1b and 3b are 3.2, 8b and 70b are 3, 405b is
        3.1. Raises ConfigError for other names, listing those that exist.
        """
        key = preset_key(name)
        if key not in PRESETS:
            raise ConfigError(
                f"there is no preset {name!r}; the presets are {', '.join(PRESETS)} "
                "(full names such as Llama-3.1-8B-Instruct work too)"
            )
        return PRESETS[key]


PRESETS = {name: LlamaConfig(**sizes) for name, sizes in SIZES.items()}
