"""What each of several ranks holds of a model, as one description for modules, for the reading of
weights and for the state of a training.

Tensor parallel (`Share`), for inference: each rank computes its part of every layer. Query heads,
the hidden dim and the vocabulary are cut into as many runs as there are ranks, and a rank has one
of each. So it has rows of q, k, v, gate, up, the embedding and the head, and columns of the output
and of down (Shoeybi et al., "Megatron-LM", 2019). Norms are everybody's.

Runs need not be equal: where something is left over, the first ranks have one more of it. A rank
has whole KV heads, with all query heads that need them. Where there are fewer KV heads than ranks,
ranks in a row share one, and its query heads are cut among them. A hidden dim that the ranks do not
divide is cut in blocks of HIDDEN_BLOCK, so that the ranks' products are as well shaped as the whole
one, and groups of quantised weights stay whole.

Fully sharded (`RowShare`), for training: each rank computes whole layers on its own data, and holds
of every tensor a run of rows, which it gives to the others when they come to that layer
(Rajbhandari et al., "ZeRO", 2020).

Legend of dims: H query heads, K KV heads, D head dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .model import LlamaConfig
from .quantization import ROWS

HIDDEN_BLOCK = 128


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `ranks` holds of the model of `whole`. The first rank has most.

    Raises ConfigError where it cannot be cut into so many parts.
    """

    whole: LlamaConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        config, ranks = self.whole, self.ranks
        if not 0 <= self.rank < ranks:
            raise ConfigError(f"rank {self.rank} of {ranks} was asked for; ranks are from 0 on")
        if ranks > config.n_kv_heads and (ranks % config.n_kv_heads or ranks > config.n_heads):
            raise ConfigError(
                f"n_heads={config.n_heads} with n_kv_heads={config.n_kv_heads} cannot be cut into "
                f"{ranks} parts: start at most as many ranks as there are KV heads, or a multiple "
                f"of them, at most as many as heads; numbers of ranks that serve are "
                f"{_serving(config)}"
            )
        if ranks > config.hidden_dim // self._hidden_block:
            raise ConfigError(
                f"hidden_dim={config.hidden_dim} cannot be cut into {ranks} equal parts, and has "
                f"{config.hidden_dim // self._hidden_block} blocks of {self._hidden_block}: start "
                "at most so many ranks"
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
        group = config.n_heads // config.n_kv_heads
        if self.ranks <= config.n_kv_heads:
            kv_heads = _run(config.n_kv_heads, self.rank, self.ranks)
            heads = kv_heads[0] * group, kv_heads[1] * group
        else:
            sharing = self.ranks // config.n_kv_heads  # ranks that have the same KV head
            head, of_sharing = divmod(self.rank, sharing)
            kv_heads = head, head + 1
            start, stop = _run(group, of_sharing, sharing)
            heads = head * group + start, head * group + stop
        block = self._hidden_block
        hidden = _run(config.hidden_dim // block, self.rank, self.ranks)
        row = self.rank * self.rows_each
        return {
            "H·D": (heads[0] * D, heads[1] * D),
            "K·D": (kv_heads[0] * D, kv_heads[1] * D),
            "F": (hidden[0] * block, hidden[1] * block),
            "V": (row, min(row + self.rows_each, config.vocab_size)),
        }

    @property
    def _hidden_block(self) -> int:
        """What the hidden dim is cut in multiples of."""
        F = self.whole.hidden_dim
        return math.gcd(F, HIDDEN_BLOCK) if F % self.ranks else F // self.ranks

    @property
    def part(self) -> LlamaConfig:
        """The config of a model of the rank's sizes."""
        sizes = {dim: stop - start for dim, (start, stop) in self.ranges.items()}
        return replace(
            self.whole,
            n_heads=sizes["H·D"] // self.whole.head_dim,
            n_kv_heads=sizes["K·D"] // self.whole.head_dim,
            hidden_dim=sizes["F"],
            vocab_size=sizes["V"],
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


def _run(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, stop) of the rank's run of `count` things; the first ranks have one more."""
    each, more = divmod(count, ranks)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def _serving(config: LlamaConfig) -> str:
    """The numbers of ranks into which the heads can be cut, in words."""
    H, K = config.n_heads, config.n_kv_heads
    shared = [str(n) for n in range(2 * K, H + 1, K)]
    return ", ".join([f"1 to {K}" if K > 1 else "1", *shared])
