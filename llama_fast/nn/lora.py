"""Linear layers and embeddings with low-rank adapters (LoRA, DoRA) and trained rows beside them.

    y = W x + s·B(A x)                         LoRA (Hu et al., 2021)
    y = m / ‖W + s·B A‖ · (W x + s·B(A x))     DoRA (Liu et al., 2024): the norm is that of a row,
                                               and no gradient flows through it
    trained rows of some tokens in the place of an embedding's and a head's own

W is frozen, of any format. A and B are float32 whatever W is; they are rounded to x's dtype, and
sums are in float32. Where a projection is several in one (qkv, gate and up), the A's are stacked,
so that x is multiplied once, and each block of W's rows has a B of its own.

Each module stands where the plain one stood and holds the same weight. Adapters have names; those
in `active` take part.

Legend of dims: C_in, C_out of a linear, C model dim, V vocabulary, R the sum of the blocks' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import needs_dispatcher
from ..errors import ConfigError
from ..ops import QuantizedWeight
from .linear import Embedding, GateUp, Linear
from .trained_rows import rows_cross_entropy


@dataclass(frozen=True)
class Block:
    """Some rows of a weight that have a B of their own; `index` among the weight's blocks."""

    index: int
    row: int
    rows: int
    rank: int
    scale: float


class LowRank(nn.Module):
    """The A's and B's of one adapter of one linear layer, and its magnitudes where it is a DoRA.

    A          (R, C_in)
    B          of each block (rows, rank)
    magnitude  of each block (rows,), or empty
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        weight: nn.Parameter | QuantizedWeight,
        *,
        dropout: float = 0.0,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.ranks = [block.rank for block in blocks]
        self.dropout = dropout
        device, C_in = weight.device, weight.shape[1]
        made = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(sum(self.ranks), C_in, **made))
        self.B = nn.ParameterList(torch.zeros(b.rows, b.rank, **made) for b in blocks)
        bound = C_in**-0.5  # Kaiming's uniform with a = √5, as nn.Linear begins
        nn.init.uniform_(self.A, -bound, bound)
        self.magnitude = nn.ParameterList()
        if dora:
            self._seen = _version(weight)
            self.register_buffer("squares", _squared_rows(weight), persistent=False)
            self.magnitude.extend(
                self.squares[b.row : b.row + b.rows].sqrt().to(dtype) for b in blocks
            )

    def add_to(self, blocks: list[Tensor], base: list[Tensor], x: Tensor, weight) -> None:
        """Adds to each block's y (…, rows); `base` are those of W alone, x (…, C_in)."""
        dropped = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        h = ops.linear(dropped, self.A.to(x.dtype)).split(self.ranks, dim=-1)
        norms = self._norms(weight) if len(self.magnitude) else None
        for i, (block, B) in enumerate(zip(self.blocks, self.B, strict=True)):
            update = ops.linear(h[i] if block.scale == 1 else h[i] * block.scale, B.to(x.dtype))
            at = block.index
            if norms is not None:
                factor = self.magnitude[i].float() / norms[i]
                update = (factor - 1).to(x.dtype) * base[at] + factor.to(x.dtype) * update
            blocks[at] = blocks[at] + update

    @torch.no_grad()
    def _norms(self, weight: nn.Parameter | QuantizedWeight) -> list[Tensor]:
        """‖W + s·B A‖ of each block's rows, without making the sum:
        ‖W‖² + 2 s·Σ_r B (A Wᵀ)ᵀ + s²·Σ_r B (A Aᵀ) B."""
        if not needs_dispatcher() and not self._has_seen(weight):
            self._seen, self.squares = _version(weight), _squared_rows(weight)
        quantized = isinstance(weight, QuantizedWeight)
        A = self.A if quantized else self.A.to(weight.dtype)
        AW = ops.linear(A, weight).float().split(self.ranks)  # of each block (rank, C_out)
        found = []
        for block, B, A, product in zip(
            self.blocks, self.B, self.A.float().split(self.ranks), AW, strict=True
        ):
            rows = slice(block.row, block.row + block.rows)
            B = B.float() * block.scale
            cross = (B * product[:, rows].t()).sum(1)
            own = (B * (B @ (A @ A.t()))).sum(1)
            found.append((self.squares[rows] + 2 * cross + own).clamp(min=0).sqrt())
        return found

    def _has_seen(self, weight: nn.Parameter | QuantizedWeight) -> bool:
        values, version = _version(weight)
        return self._seen[0] is values and self._seen[1] == version

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{b.rank} (scale {b.scale:g})" for b in self.blocks)
        return f"ranks {ranks}" + (f", dropout {self.dropout}" if self.dropout else "")


def _version(weight: nn.Parameter | QuantizedWeight) -> tuple[Tensor, int]:
    """What changes when the weight is another one or was written to."""
    values = weight.qdata if isinstance(weight, QuantizedWeight) else weight
    return values, 0 if values.is_inference() else values._version


@torch.no_grad()
def _squared_rows(weight: nn.Parameter | QuantizedWeight) -> Tensor:
    """‖W‖² of each row, (C_out,) float32."""
    weight = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
    return weight.square().sum(1)


class _Adapted(nn.Module):
    """What adapted linears and embeddings share: the plain module, and adapters by name."""

    def _adapt(self, plain: nn.Module) -> None:
        nn.Module.__init__(self)
        # One dict: of a fully sharded model, torch puts what it has gathered into the plain one's.
        self._parameters = plain._parameters
        self.weight = plain.weight
        self.lora = nn.ModuleDict()
        self.rows = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._plain = (plain,)  # in a tuple: it is no part of this module
        self.train(plain.training)

    def plain(self) -> nn.Module:
        """Returns the module that stood here, with the weight that is here now."""
        self._plain[0].weight = self.weight
        return self._plain[0].train(self.training)

    def names(self) -> set[str]:
        return {*self.lora, *self.rows}

    def drop(self, name: str) -> None:
        for held in (self.lora, self.rows):
            if name in held:
                del held[name]
        self.activate(name, False)

    def activate(self, name: str, on: bool) -> None:
        others = tuple(x for x in self.active if x != name)
        self.active = (*others, name) if on else others

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={list(self.active)}"

    def _active(self, held: nn.ModuleDict) -> list[nn.Module]:
        return [held[name] for name in self.active if name in held]


class AdaptedLinear(_Adapted, Linear):
    """A linear layer with adapters; `sizes` are the rows of the weight's blocks (of q, k and v)."""

    def __init__(self, plain: Linear, sizes: Sequence[int]) -> None:
        self._adapt(plain)
        self.sizes = tuple(sizes)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """Returns y (…, rows) of each block."""
        blocks = list(ops.linear(x, self.weight).split(self.sizes, dim=-1))
        base = list(blocks)
        for low_rank in self._active(self.lora):
            low_rank.add_to(blocks, base, x, self.weight)
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks(x)
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        for rows in self._active(self.rows):
            y = rows.into_logits(y, x)
        return y

    def cross_entropy(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        padding: int = 0,
    ) -> Tensor:
        """As `Linear.cross_entropy`. With an adapter of low rank the logits are whole for a while;
        with trained rows they are not."""
        settings = {"ignore_index": ignore_index, "reduction": reduction}
        rows = self._active(self.rows)
        if self._active(self.lora) or len(rows) > 1:
            logits = self(x).float()
            logits = logits[..., :-padding] if padding else logits
            logits = logits.movedim(-1, 1) if x.ndim > 2 else logits
            return nn.functional.cross_entropy(logits, targets, **settings)
        if not rows:
            return super().cross_entropy(x, targets, **settings, padding=padding)
        return rows_cross_entropy(x, self.weight, rows[0], targets, **settings, padding=padding)


class AdaptedGateUp(AdaptedLinear, GateUp):
    """gate and up with adapters: their outputs are separate until both are complete, so the fused
    epilogue serves only where no adapter is active."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._active(self.lora):
            return GateUp.forward(self, x)
        return ops.swiglu(*self.blocks(x))


class LowRankEmbedding(nn.Module):
    """An adapter of an embedding: A (rank, V) zero, B (C, rank) normal, as PEFT begins."""

    def __init__(
        self,
        rank: int,
        scale: float,
        weight: nn.Parameter | QuantizedWeight,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scale = scale
        V, C = weight.shape
        made = {"device": weight.device, "dtype": dtype}
        self.A = nn.Parameter(torch.zeros(rank, V, **made))
        self.B = nn.Parameter(torch.empty(C, rank, **made))
        nn.init.normal_(self.B)

    def extra_repr(self) -> str:
        return f"rank {len(self.A)} (scale {self.scale:g})"

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The update of x (…, C), the embedding of tokens (…)."""
        h = nn.functional.embedding(tokens, self.A.t()) * self.scale
        return ops.linear(h.to(x.dtype), self.B.to(x.dtype))


class AdaptedEmbedding(_Adapted, Embedding):
    """An embedding with adapters and trained rows."""

    def __init__(self, plain: Embedding) -> None:
        self._adapt(plain)

    def forward(self, tokens: Tensor) -> Tensor:
        x = Embedding.forward(self, tokens)
        for low_rank in self._active(self.lora):
            x = x + low_rank(tokens, x)
        for rows in self._active(self.rows):
            x = rows.look_up(tokens, x)
        return x


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear | AdaptedEmbedding]:
    """Returns the modules of a model that have adapters, by their names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Adapted)}


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of the adapters on a model."""
    return sorted({name for module in adapted_modules(model).values() for name in module.names()})


def refuse_adapters(model: nn.Module, action: str) -> None:
    """Raises ConfigError where a model has adapters, which `action` would lose."""
    if names := adapter_names(model):
        raise ConfigError(
            f"the model has the adapter {', '.join(names)}, and {action} would lose it; save it "
            "with adapter.save(folder), or make it part of the weights with adapter.merge()"
        )
