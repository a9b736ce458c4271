"""How positions are stretched since Llama 3.1."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .checks import check_number, check_size


@dataclass(frozen=True)
class RopeScaling:
    """The long-context scaling of Llama 3.1 and later (see `llama_fast.nn.rope`)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        check_number("rope scaling factor", self.factor, minimum=1.0)
        check_number("rope scaling low_freq_factor", self.low_freq_factor)
        check_number("rope scaling high_freq_factor", self.high_freq_factor)
        check_size("rope scaling original_max_seq_len", self.original_max_seq_len)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling has low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; it needs 0 < low < high "
                "(Llama 3.1 has 1 and 4)"
            )
