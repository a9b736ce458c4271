"""Llama 3: embedding, blocks of attention and SwiGLU with RMSNorm before each, and a linear head.

Grattafiori et al., "The Llama 3 Herd of Models" (2024). Every hot operation is an op of the table;
this file only says in which order they come.

Legend of dims: B batch, T query tokens, C model dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, ops
from .config import LlamaConfig
from .errors import ConfigError, ShapeError
from .kv_cache import KVCache, cache_dtype
from .nn import MLP, Attention, Embedding, LayerCache, Linear, RMSNorm, RotaryEmbedding
from .ops import QuantizedWeight
from .quantize import Quantization, quantization_of, round_rows
from .registry import reserve


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
        self.attention = Attention(config, device, dtype)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(config, device, dtype)

    def forward(
        self,
        update: Tensor | None,  # (B,T,C)
        x: Tensor,  # (B,T,C), the residual stream
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor]:
        if update is None:
            h = self.attention_norm(x)
        else:
            h, x = self.attention_norm(update, x)
        update = self.attention(h, cos, sin, cache)
        h, x = self.mlp_norm(update, x)
        return self.mlp(h), x


class Llama(nn.Module):
    """A Llama 3 text model of any size.

    `model(tokens, cache=None, last_only=False)` → logits. With a `KVCache` the tokens are appended
    to it and no gradient is recorded; without one they are whole sequences.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, device, dtype)
        self.layers = nn.ModuleList(Block(config, device, dtype) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.head = Linear(config.dim, config.vocab_size, device, dtype)
        self.tie()
        self.rope = RotaryEmbedding(config, device)
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

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """The final hidden states: tokens (B,T) int64 → (B,T,C), after the last norm."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ShapeError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be torch.int64 (B,T)"
            )
        if cache is None:
            return self._hidden(tokens, None)
        with torch.no_grad():
            return self._hidden(tokens, cache)

    def _hidden(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        T = tokens.shape[1]
        if cache is None:
            if T > self.config.max_seq_len:
                raise ShapeError(
                    f"{T} tokens were given; this model's context is {self.config.max_seq_len}"
                )
            cos, sin = self.rope(T)
        else:
            lengths = cache.advance(T)
            cos, sin = self.rope(self.config.max_seq_len)
        x, update = self.embed(tokens).to(self.dtype), None
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else (*cache.layer(index), lengths)
            update, x = block(update, x, cos, sin, layer_cache)
        return self.norm(update, x)[0]

    def forward(
        self, tokens: Tensor, *, cache: KVCache | None = None, last_only: bool = False
    ) -> Tensor:
        """tokens (B,T) int64 → logits (B,T,V) float32, or (B,1,V) of the last token alone."""
        h = self.hidden(tokens, cache=cache)
        if last_only:
            h = h[:, -1:]
        return self.head(h).float()

    def loss(self, tokens: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """Mean cross entropy of `targets` (B,T) int64. The logits are never stored whole."""
        h = self.hidden(tokens)
        return ops.linear_cross_entropy(h, self.head.weight, targets, ignore_index=ignore_index)

    def new_cache(self, batch: int, max_seq_len: int, kv_cache: str | None = None) -> KVCache:
        """An empty cache on this model's device, of its dtype or as `kv_cache` ("int8") says."""
        dtype = cache_dtype(kv_cache, self.dtype)
        return KVCache(self.config, batch, max_seq_len, device=self.device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of the weights that are not quantised."""
        return self.norm.weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | checkpoint.Checkpoint | checkpoint.QuantizedCheckpoint,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        quantize: str | Quantization | None = None,
        max_seq_len: int | None = None,
        progress: checkpoint.Progress | None = None,
    ) -> Llama:
        """Loads a folder of Meta's (`params.json`) or Hugging Face's (`config.json`) format, or of
        quantised weights, or one that `checkpoint.open_checkpoint` has opened.

        device       "auto": the GPU when there is one, else the CPU
        dtype        of the weights; None keeps the file's
        quantize     "int8", "int4" or a `Quantization`: weights are stored as integers, each as it
                     is read. None keeps them; a folder that is quantised is loaded as it is
        max_seq_len  a shorter context than the model's own: smaller tables and caches
        progress     called as progress(bytes done, bytes in all, name) while the weights stream in

        Weights are streamed: the peak of memory is the model and a few blocks of one weight, also
        where they are quantised on the way. Those of a quantised folder are mapped: on the
        CPU they take no time to load, and of memory the pages that are used.
        Raises CheckpointError or ConfigError, naming the file and the remedy.
        """
        settings = None if quantize is None else Quantization.of(quantize)
        opened = not isinstance(path, str | Path)
        source = path if opened else checkpoint.open_checkpoint(path)
        config = source.config.shortened(max_seq_len)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = cls(config, device="meta", dtype=dtype or source.dtype)
        if isinstance(source, checkpoint.QuantizedCheckpoint):
            if settings is not None:
                raise ConfigError(
                    f"{source.folder} is quantised already ({source.quantization}); leave quantize "
                    "out, or give the folder that it was made from"
                )
            for name, weight in source.tensors().items():
                if not isinstance(weight, Tensor):
                    weight = source.quantization.of_weight(name).holding(
                        weight, checkpoint.state_shapes(config)[name]
                    )
                model.set_weight(name, weight.to(device))
        elif settings is not None:
            shapes = checkpoint.state_shapes(config)
            for name, rows in source.rows(progress=progress):
                on_device = (part.to(device) for part in rows)
                weight = round_rows(shapes[name], on_device, settings.of_weight(name), device)
                model.set_weight(name, weight)
        else:
            for name, shape in checkpoint.state_shapes(config).items():
                fresh = torch.empty(shape, device=device, dtype=model.dtype)
                model.set_weight(name, reserve(fresh))
            model.tie()
            source.load_into(model.state_dict(), progress=progress)
        model.tie()
        model.rope = RotaryEmbedding(config, device)
        return model.eval()

    def set_weight(self, name: str, weight: Tensor | QuantizedWeight) -> None:
        """Puts a weight in the place of the one of that name ("layers.0.mlp.down.weight"); a float
        in the model's dtype, and without a copy where it has it."""
        module = self.get_submodule(name.removesuffix(".weight"))
        if isinstance(weight, Tensor):
            weight = nn.Parameter(weight.to(self.dtype))
        module.weight = weight

    def save_pretrained(self, path: str | Path, format: str = "hf") -> None:
        """Writes the model as a new folder in Hugging Face's ("hf") or Meta's ("meta") format; one
        that is quantised as `checkpoint.quantized` says, whose config.json is Hugging Face's.

        Raises CheckpointError when the folder exists or cannot be written; nothing half-written
        is left behind.
        """
        if format not in ("hf", "meta"):
            raise ConfigError(f'format is {format!r}; it must be "hf" or "meta"')
        quantization = quantization_of(self)
        if quantization is None:
            write = checkpoint.write_hf if format == "hf" else checkpoint.write_meta
            write(path, self.config, self.state_dict())
        elif format == "hf":
            checkpoint.write_quantized(path, self.config, quantization, self.state_dict())
        else:
            raise ConfigError(
                f"the model is quantised ({quantization}), which Meta's format cannot hold; "
                'leave format="hf"'
            )
