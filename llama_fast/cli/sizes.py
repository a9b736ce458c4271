"""Sizes of models as the command line names them: the published ones, and one for a laptop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import LlamaConfig

LAPTOP = "135m"


def sized(name: str) -> LlamaConfig:
    """Returns the configuration of a published Llama 3, or with "135m" that of SmolLM2-135M: a
    Llama that any machine holds, with Llama 3's head and hidden dims in small.

    Raises ConfigError for another name, listing those that exist.
    """
    from ..config import LlamaConfig

    if name.strip().lower() == LAPTOP:
        return LlamaConfig(
            dim=576,
            n_layers=30,
            n_heads=9,
            n_kv_heads=3,
            head_dim=64,
            hidden_dim=1536,
            vocab_size=49152,
            rope_theta=100000.0,
            tied=True,
        )
    try:
        return LlamaConfig.preset(name)
    except ConfigError as error:
        raise ConfigError(f"{error}; {LAPTOP} is a small one, for a laptop") from None
