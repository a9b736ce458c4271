"""Llama 3: embedding, blocks of attention and SwiGLU with RMSNorm before each, and a linear head.

Grattafiori et al., "The Llama 3 Herd of Models" (2024). Every hot operation is an op of the table;
this file only says in which order they come.

Legend of dims: B batch, T query tokens, C model dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import LlamaConfig
from ..config.checks import check_dtype
from ..distributed.tensor_parallel import share_of
from ..errors import PromptError, ShapeError
from ..nn import (
    MLP,
    Attention,
    Embedding,
    KVCache,
    LayerCache,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    cache_dtype,
)
from ..ops import documents
from ..utils.normal_tensors import normal_tensors
from .loading import Pretrained


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    The sum of a residual and the norm that follows it are one kernel, so a block takes the last
    block's update still apart from the residual stream, and hands its own on in the same way.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim, device, dtype
        )
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(config.dim, config.hidden_dim, device, dtype)

    def forward(
        self,
        update: Tensor | None,  # (B,T,C)
        x: Tensor,  # (B,T,C), the residual stream
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        cu_seqlens: Tensor | None = None,  # (n+1,) int32
    ) -> tuple[Tensor, Tensor]:
        if update is None:
            h = self.attention_norm(x)
        else:
            h, x = self.attention_norm(update, x)
        update = self.attention(h, cos, sin, cache, cu_seqlens)
        h, x = self.mlp_norm(update, x)
        return self.mlp(h), x


class Llama(Pretrained):
    """A Llama 3 text model of any size.

    `model(tokens, cache=None, last_only=False, cu_seqlens=None)` → logits. With a `KVCache` the
    tokens are appended to it and no gradient is recorded; without one they are whole sequences.
    With `cu_seqlens` (n+1,) int32, from 0 to T, they are one row (B = 1) of n documents packed one
    behind another: document i is the tokens cu_seqlens[i] … cu_seqlens[i+1]-1. Each starts at
    position 0, sees itself alone and may be as long as the context; the row may be longer.
    """

    @normal_tensors()
    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_dtype(dtype)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, device, dtype)
        self.layers = nn.ModuleList(Block(config, device, dtype) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.head = Linear(config.dim, config.vocab_size, device, dtype)
        self.tie()
        self.rope = _rotary_embedding(config, device)
        if not self.embed.weight.is_meta:
            self.reset_parameters()

    def tie(self) -> None:
        """Makes the head the embedding itself, where the model says so."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Weights for training from nothing: see `checkpoint.initial_std`."""
        for name, parameter in self.named_parameters():
            std = checkpoint.initial_std(self.config, name)
            if std is None:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def hidden(
        self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The final hidden states: tokens (B,T) int64 → (B,T,C), after the last norm."""
        if cache is None:
            return self._hidden(tokens, None, cu_seqlens)
        with torch.no_grad():
            h = self._hidden(tokens, cache, cu_seqlens)
        cache.advance(tokens.shape[1])
        return h

    def _hidden(self, tokens: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """As `hidden`; that the cache holds T tokens more is left to the caller to say, after all
        that can raise."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ShapeError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be torch.int64 (B,T)"
            )
        T = tokens.shape[1]
        if cu_seqlens is not None:
            if cache is not None:
                raise ShapeError(
                    "cu_seqlens and a cache were given; a cache holds one sequence a row, not "
                    "packed documents: leave out one of the two"
                )
            documents.check("the model", cu_seqlens, tokens)
            cos, sin = self.rope(T, cu_seqlens)
        elif cache is None:
            if T > self.config.max_seq_len:
                raise ShapeError(
                    f"{T} tokens were given; this model's context is {self.config.max_seq_len}. "
                    "Where they are several documents, say where each ends: cu_seqlens"
                )
            cos, sin = self.rope(T)
        else:
            lengths = cache.ahead(T)
            cos, sin = self.rope(self.config.max_seq_len)
        x, update = self.embed(tokens).to(self.dtype), None
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else (*cache.layer(index, T), lengths)
            update, x = block(update, x, cos, sin, layer_cache, cu_seqlens)
        return self.norm(update, x)[0]

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
        own_logits: bool = False,
    ) -> Tensor:
        """tokens (B,T) int64 → logits (B,T,V) float32, or (B,1,V) of the last token alone. Those of
        the rows that `config.vocab_padding` says are no token's are -inf. With `own_logits`, of a
        model over ranks, those of this rank's rows of the vocabulary: they are not gathered."""
        if cache is None:
            return self._logits(self._hidden(tokens, None, cu_seqlens), last_only, own_logits)
        with torch.no_grad():
            logits = self._logits(self._hidden(tokens, cache, cu_seqlens), last_only, own_logits)
        cache.advance(tokens.shape[1])
        return logits

    def _logits(self, h: Tensor, last_only: bool, own: bool) -> Tensor:
        h = h[:, -1:] if last_only else h
        logits, padding = self.head.own(h) if own else (self.head(h), self.config.vocab_padding)
        logits = logits.float()
        if padding:
            # Rows that are no token's are never drawn, whoever draws.
            known = logits[..., :-padding]
            logits = nn.functional.pad(known, (0, padding), value=-torch.inf)
        return logits

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean cross entropy of `targets` (B,T) int64, or their "sum". The logits are never stored
        whole. Of documents that are packed by cu_seqlens the mean is over all their targets; that
        of each document's last token, which has no next one, should be `ignore_index`."""
        h = self.hidden(tokens, cu_seqlens=cu_seqlens)
        settings = {"ignore_index": ignore_index, "reduction": reduction}
        return self.head.cross_entropy(h, targets, **settings, padding=self.config.vocab_padding)

    def new_cache(self, batch: int, max_seq_len: int, kv_cache: str | None = None) -> KVCache:
        """Returns an empty cache on this model's device, of its dtype or as `kv_cache` ("int8")
        says. Raises PromptError for more tokens than the model's context."""
        if not 0 < max_seq_len <= self.config.max_seq_len:
            raise PromptError(
                f"a cache for {max_seq_len} tokens was asked for; this model's context is "
                f"1 to {self.config.max_seq_len} tokens"
            )
        share = share_of(self)
        return KVCache(
            batch,
            max_seq_len,
            n_layers=self.config.n_layers,
            n_kv_heads=(share.part if share else self.config).n_kv_heads,
            head_dim=self.config.head_dim,
            device=self.device,
            dtype=cache_dtype(kv_cache, self.dtype),
        )

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of the weights that are not quantised."""
        return self.norm.weight.dtype


def _rotary_embedding(config: LlamaConfig, device: torch.device | str | None) -> RotaryEmbedding:
    return RotaryEmbedding(
        config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling, device
    )
