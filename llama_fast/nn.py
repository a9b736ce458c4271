"""The building blocks of Llama 3 as modules over the ops; import them into a model of your own.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops
from .config import LlamaConfig
from .errors import ShapeError
from .ops import QuantizedKV, QuantizedWeight
from .rope import rope_tables


class RMSNorm(nn.Module):
    """Stands where `torch.nn.RMSNorm` stood, for one normalised dim with a weight.

    `norm(x)` → y, of x's shape (..., C). `norm(x, residual)` → (y, x + residual): the sum is
    normalised and returned too, in one kernel.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if len(shape) != 1 or not elementwise_affine:
            raise ShapeError(
                f"RMSNorm normalises the last dim and has a weight; given {shape} and "
                f"elementwise_affine={elementwise_affine}. Use torch.nn.RMSNorm for other forms"
            )
        self.normalized_shape = shape
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        # torch.nn.RMSNorm means by None the machine epsilon of the input's dtype.
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if residual is None:
            return ops.rms_norm(x, self.weight, eps)
        return ops.add_rms_norm(x, residual, self.weight, eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"


class _Weighted(nn.Module):
    """A module whose `weight` is a Parameter, or a QuantizedWeight assigned in its place."""

    weight: nn.Parameter | QuantizedWeight

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, QuantizedWeight):
            self._parameters.pop(name, None)  # torch would refuse a module in its place
        super().__setattr__(name, value)


class Linear(_Weighted):
    """y = x Wᵀ, without bias: x (..., in_features) → (..., out_features)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class GateUp(Linear):
    """silu(x W_gateᵀ) · (x W_upᵀ): x (..., in_features) → (..., out_features / 2). The weight's
    first half are the rows of the gate, its second those of `up`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_swiglu(x, self.weight)


class Embedding(_Weighted):
    """A row of the weight for each token: tokens (...) int64 → (..., embedding_dim), of the
    weight's dtype; float32 where it is quantised."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.rows(tokens)
        return nn.functional.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class RotaryEmbedding(nn.Module):
    """The tables cos and sin, each (max_seq_len, D/2) float32 whatever the model's dtype."""

    def __init__(self, config: LlamaConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_seq_len, config.head_dim // 2)
        for name in ("cos", "sin"):
            table = torch.empty(shape, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset()

    def reset(self) -> None:
        if not self.cos.is_meta:
            self.cos, self.sin = rope_tables(self.config, len(self.cos), device=self.cos.device)

    def _apply(self, fn, recurse: bool = True):
        """A cast of the whole model must not round the tables, and memory given to a model that
        had none (`to_empty`) must be filled: then the tables are made anew."""
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if was_meta or self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
            self.reset()
        return self

    def forward(self, T: int) -> tuple[Tensor, Tensor]:
        """The rows of positions 0 … T-1."""
        return self.cos[:T], self.sin[:T]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and one fused projection for q, k and v."""

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)  # of q, k, v
        self.head_dim = config.head_dim
        width = sum(self.heads) * config.head_dim
        self.qkv = Linear(config.dim, width, device, dtype)
        self.output = Linear(config.n_heads * config.head_dim, config.dim, device, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None) -> Tensor:
        """x (B,T,C) → (B,T,C). Without a cache the T tokens are the whole sequence; with one they
        are appended to it, and attend to all that it holds."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B,T,H+2K,D)
        q, k, v = qkv.split(self.heads, dim=-2)
        if cache is None:
            q, k = ops.rope(q, k, cos, sin)
            o = ops.attention(q, k, v)
        else:
            keys, values, lengths = cache
            q = ops.kv_append(q, k, v, cos, sin, keys, values, lengths)
            o = ops.attention(q, keys, values, lengths=lengths)
        return self.output(o.flatten(-2))


# One layer's share of a KV cache: keys (B,S,K,D), values (B,S,K,D), lengths (B,) after the append.
LayerCache = tuple[Tensor | QuantizedKV, Tensor | QuantizedKV, Tensor]


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) · up(x)), gate and up in one projection."""

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = GateUp(config.dim, 2 * config.hidden_dim, device, dtype)
        self.down = Linear(config.hidden_dim, config.dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))
