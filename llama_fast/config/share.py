"""What each of several ranks holds of a model, as one description for modules, for the reading of
weights and for the state of a training.

Tensor parallel (`Share`), for inference: each rank computes its part of every layer. Query heads,
the hidden dim and the vocabulary are cut into as many runs as there are ranks, and a rank has one
of each. So it has rows of q, k, v, gate, up, the embedding and the head, and columns of the output
and of down (Shoeybi et al., "Megatron-LM", 2019). Norms are everybody's. Where there are fewer KV
heads than ranks, ranks in a row share one: each has the head that its query heads need.

Fully sharded (`RowShare`), for training: each rank computes whole layers on its own data, and holds
of every tensor a run of rows, which it gives to the others when they come to that layer
(Rajbhandari et al., "ZeRO", 2020).

Legend of dims: H query heads, K KV heads, D head dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ConfigError
from .model import LlamaConfig
from .quantization import ROWS


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `ranks` holds of the model of `whole`.

    Raises ConfigError where it cannot be cut into so many equal parts.
    """

    whole: LlamaConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        config, ranks = self.whole, self.ranks
        if not 0 <= self.rank < ranks:
            raise ConfigError(f"rank {self.rank} of {ranks} was asked for; ranks are from 0 on")
        for name in ("n_heads", "hidden_dim"):
            if getattr(config, name) % ranks:
                raise ConfigError(
                    f"{name}={getattr(config, name)} cannot be cut into {ranks} equal parts; "
                    f"numbers of ranks that serve are {_serving(config)}"
                )
        if config.n_kv_heads % ranks and ranks % config.n_kv_heads:
            raise ConfigError(
                f"n_kv_heads={config.n_kv_heads} can be neither cut into {ranks} equal parts nor "
                f"be shared by as many ranks each; numbers of ranks that serve are "
                f"{_serving(config)}"
            )
        if self.rows_each * (ranks - 1) >= config.vocab_size:
            raise ConfigError(
                f"vocab_size={config.vocab_size} is too small for {ranks} ranks, which have "
                f"multiples of {ROWS} rows: start fewer"
            )

    @property
    def rows_each(self) -> int:
        """Rows of the vocabulary that each rank has, but for the last, which may have fewer: whole
        blocks of quantised weights."""
        blocks = -(-self.whole.vocab_size // ROWS)
        return -(-blocks // self.ranks) * ROWS

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """(start, stop) of what the rank has of each dim that is cut, by the dims' letters as the
        table of names has them."""
        config, D = self.whole, self.whole.head_dim
        heads, hidden = config.n_heads // self.ranks, config.hidden_dim // self.ranks
        kv_heads = max(1, config.n_kv_heads // self.ranks)
        first_kv_head = self.rank * config.n_kv_heads // self.ranks
        row = self.rank * self.rows_each
        return {
            "H·D": _run(self.rank * heads * D, heads * D),
            "K·D": _run(first_kv_head * D, kv_heads * D),
            "F": _run(self.rank * hidden, hidden),
            "V": (row, min(row + self.rows_each, config.vocab_size)),
        }

    @property
    def part(self) -> LlamaConfig:
        """The config of a model of the rank's sizes."""
        start, stop = self.ranges["V"]
        return replace(
            self.whole,
            n_heads=self.whole.n_heads // self.ranks,
            n_kv_heads=max(1, self.whole.n_kv_heads // self.ranks),
            hidden_dim=self.whole.hidden_dim // self.ranks,
            vocab_size=stop - start,
            vocab_padding=0,  # a matter of the whole vocabulary
        )


@dataclass(frozen=True)
class RowShare:
    """What rank `rank` of `ranks` holds of each tensor that is cut along dim 0: as `torch.chunk`
    cuts, so the last ranks may have fewer rows than the others, or none."""

    rank: int
    ranks: int

    def of(self, rows: int) -> tuple[int, int]:
        """(start, stop) of what the rank has of so many rows."""
        each = -(-rows // self.ranks)
        return min(self.rank * each, rows), min((self.rank + 1) * each, rows)


def _run(start: int, length: int) -> tuple[int, int]:
    return start, start + length


def _serving(config: LlamaConfig) -> str:
    """The numbers of ranks into which the heads and the hidden dim can be cut, in words."""
    H, K, F = config.n_heads, config.n_kv_heads, config.hidden_dim
    fit = (n for n in range(1, H + 1) if not (H % n or F % n or (K % n and n % K)))
    return ", ".join(map(str, fit))
