"""What a model of some size calls the ops with: random arguments, laid out as in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.quantization import NAMED, packed_shapes
from ..dispatch import reserve

# bits and group size of the weights of a layer, by the name of the quantisation.
WEIGHT_FORMATS = {name: (form.mlp.bits, form.mlp.group_size) for name, form in NAMED.items()}


@dataclass(frozen=True)
class Work:
    """What a model is asked for: T new tokens of each of B sequences, which are the last of S."""

    name: str
    batch: int
    tokens: int
    keys: int

    @classmethod
    def decode(cls, keys: int) -> Work:
        return cls("decode", 1, 1, keys)

    @classmethod
    def prefill(cls, tokens: int) -> Work:
        return cls("prefill", 1, tokens, tokens)

    @classmethod
    def training(cls, tokens: int, batch: int = 1) -> Work:
        """Whole sequences of that many tokens, each of which sees those before it."""
        return cls("training", batch, tokens, tokens)

    def __str__(self) -> str:
        of = f", {self.keys} keys" if self.keys != self.tokens else ""
        many = f"{self.batch} × " if self.batch > 1 else ""
        return f"{self.name}, {many}{self.tokens} token{'s' * (self.tokens > 1)}{of}"


class ModelInputs:
    """Draws the arguments of one call after another.

    rope_tables  (D, S, theta, scaling, device) → cos and sin: `llama_fast.nn.rope.rope_tables`
    device       "meta" for shapes alone: nothing is drawn
    gradient     whether calls ask for what only a gradient needs
    """

    def __init__(
        self,
        config: LlamaConfig,
        work: Work,
        dtype: torch.dtype,
        device: str,
        seed: int,
        rope_tables: Callable[..., tuple[Tensor, Tensor]],
        gradient: bool = False,
    ) -> None:
        self.config, self.work, self.dtype, self.device = config, work, dtype, device
        self.gradient, self._rope_tables = gradient, rope_tables
        where = "cpu" if device == "meta" else device
        self.generator = torch.Generator(where).manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        # Drawn in their own dtype: a head of float32 numbers would take a gigabyte more.
        x = reserve(torch.empty(shape, dtype=self.dtype, device=self.device))
        return x.normal_(0, scale, generator=self.generator)

    def rows(self, width: int) -> Tensor:
        """(B, T, width)"""
        return self.randn(self.work.batch, self.work.tokens, width)

    def heads(self) -> tuple[Tensor, ...]:
        """q (B,T,H,D), k and v (B,T,K,D): slices of the fused projection."""
        c = self.config
        counts = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        qkv = self.rows(sum(counts) * c.head_dim).unflatten(-1, (-1, c.head_dim))
        return qkv.split(counts, dim=-2)

    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin (S, D/2) of all positions."""
        c = self.config
        sizes = (c.head_dim, self.work.keys)
        return self._rope_tables(*sizes, c.rope_theta, c.rope_scaling, self.device)

    def cache(self, int8: bool = False) -> tuple[Tensor, Tensor | None]:
        """Keys or values (B,S,K,D), of which what one head reads is contiguous; and where they are
        in 8 bits their scales (B,S,K), for numbers as large: a root mean square of 1."""
        c = self.config
        heads = (self.work.batch, c.n_kv_heads, self.work.keys)
        shape = (*heads, c.head_dim)
        if not int8:
            return self.randn(*shape).transpose(1, 2), None
        if self.device == "meta":
            values = torch.empty(shape, dtype=torch.int8, device="meta")
            scale = torch.empty(heads, dtype=torch.float32, device="meta")
        else:
            values = torch.empty(shape, dtype=torch.int8, device=self.device)
            values.random_(-127, 128, generator=self.generator)
            scale = (0.5 + self._rand(heads)) / 76
        return values.transpose(1, 2), scale.transpose(1, 2)

    def lengths(self) -> Tensor:
        return torch.full((self.work.batch,), self.work.keys, device=self.device)

    def targets(self, *shape: int) -> Tensor:
        at = self.generator.device
        drawn = torch.randint(self.config.vocab_size, shape, generator=self.generator, device=at)
        return drawn.to(self.device)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(C_out, C_in) of each linear layer, as `llama_fast.nn` fuses them."""
        c = self.config
        width = c.n_heads * c.head_dim
        return {
            "qkv": (width + 2 * c.n_kv_heads * c.head_dim, c.dim),
            "output": (c.dim, width),
            "gate_up": (2 * c.hidden_dim, c.dim),
            "down": (c.dim, c.hidden_dim),
            "head": (c.vocab_size, c.dim),
        }

    def weight(self, matrix: str) -> Tensor:
        """One of the matrices, for results of the order of 1."""
        C_out, C_in = self.matrices()[matrix]
        return self.randn(C_out, C_in, scale=C_in**-0.5)

    def quantized_weight(self, matrix: str, bits: int, group_size: int) -> tuple:
        """The same as the arguments of a QuantizedWeight."""
        C_out, C_in = self.matrices()[matrix]
        values, scales = packed_shapes(C_out, C_in, bits, group_size)
        if self.device == "meta":
            packed = torch.empty(values, dtype=torch.uint8, device="meta")
            sizes = torch.empty(scales, dtype=torch.float16, device="meta")
        else:
            drawn = {"generator": self.generator, "device": self.device}
            packed = torch.randint(256, values, dtype=torch.uint8, **drawn)
            sizes = ((0.5 + self._rand(scales)) * C_in**-0.5 / 2 ** (bits - 1)).half()
        return packed, sizes, None, C_out, bits, group_size

    def _rand(self, shape: tuple[int, ...]) -> Tensor:
        drawn = {"generator": self.generator, "device": self.device}
        return torch.rand(shape, dtype=torch.float32, **drawn)
