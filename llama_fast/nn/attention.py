"""Grouped-query attention of one layer.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .linear import Linear

# One layer's share of a KV cache: keys (B,S,K,D), values (B,S,K,D), their scales (B,S,K) where they
# are in 8 bits, lengths (B,) after the append.
LayerCache = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and one fused projection for q, k and v."""

    def __init__(
        self,
        dim: int,  # C
        n_heads: int,  # H
        n_kv_heads: int,  # K
        head_dim: int,  # D
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = (n_heads, n_kv_heads, n_kv_heads)  # of q, k, v
        self.head_dim = head_dim
        self.qkv = Linear(dim, sum(self.heads) * head_dim, device, dtype)
        self.output = Linear(n_heads * head_dim, dim, device, dtype)

    def forward(
        self,
        x: Tensor,  # (B,T,C)
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x (B,T,C) → (B,T,C). Without a cache the T tokens are the whole sequence, or with
        cu_seqlens (n+1,) int32 the packed documents of one row, each of which sees itself alone;
        with a cache they are appended to it, and attend to all that it holds."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B,T,H+2K,D)
        q, k, v = qkv.split(self.heads, dim=-2)
        if cache is None:
            q, k = ops.rope(q, k, cos, sin)
            if v.requires_grad:
                v = v.contiguous()  # or the backward pass would keep all of qkv for it
            o = ops.attention(q, k, v, cu_seqlens=cu_seqlens)
        else:
            keys, values, k_scale, v_scale, lengths = cache
            scales = {"k_scale": k_scale, "v_scale": v_scale}
            q = ops.kv_append(q, k, v, cos, sin, keys, values, lengths, **scales)
            o = ops.attention(q, keys, values, lengths=lengths, **scales)
        return self.output(o.flatten(-2))
