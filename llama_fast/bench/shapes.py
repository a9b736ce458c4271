"""What a model's shape gives each op: one registry of arguments for benchmarks and profiles.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.quantization import NAMED, packed_shapes
from ..dispatch import reserve
from ..errors import ConfigError
from ..nn.rope import rope_tables
from ..ops.quantized_kv import QuantizedKV


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


class _Maker:
    """Draws the arguments of one call after another."""

    def __init__(
        self, config: LlamaConfig, work: Work, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        self.config, self.work, self.dtype, self.device = config, work, dtype, device
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

    def cache(self) -> Tensor:
        """(B,S,K,D), of which what one head reads is contiguous."""
        c = self.config
        shape = (self.work.batch, c.n_kv_heads, self.work.keys, c.head_dim)
        return self.randn(*shape).transpose(1, 2)

    def quantized_cache(self) -> QuantizedKV:
        """A cache of the same layout in 8 bits, of numbers as large: a root mean square of 1."""
        c = self.config
        shape = (self.work.batch, c.n_kv_heads, self.work.keys)
        if self.device == "meta":
            codes = torch.empty((*shape, c.head_dim), dtype=torch.int8, device="meta")
            scales = torch.empty(shape, dtype=torch.float32, device="meta")
        else:
            drawn = {"generator": self.generator, "device": self.device}
            codes = torch.randint(-127, 128, (*shape, c.head_dim), dtype=torch.int8, **drawn)
            scales = (0.5 + torch.rand(shape, dtype=torch.float32, **drawn)) / 76
        return QuantizedKV(*(x.transpose(1, 2) for x in (codes, scales)))

    def lengths(self) -> Tensor:
        return torch.full((self.work.batch,), self.work.keys, device=self.device)

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


def _rms_norm(m: _Maker) -> tuple:
    return m.rows(m.config.dim), m.randn(m.config.dim), m.config.norm_eps


def _add_rms_norm(m: _Maker) -> tuple:
    C = m.config.dim
    return m.rows(C), m.rows(C), m.randn(C), m.config.norm_eps


def _swiglu(m: _Maker) -> tuple:
    return m.rows(2 * m.config.hidden_dim).chunk(2, dim=-1)


def _tables(m: _Maker) -> tuple[torch.Tensor, torch.Tensor]:
    c = m.config
    return rope_tables(c.head_dim, m.work.keys, c.rope_theta, c.rope_scaling, m.device)


def _rope(m: _Maker) -> tuple:
    q, k, _ = m.heads()
    cos, sin = _tables(m)
    return q, k, cos[-m.work.tokens :], sin[-m.work.tokens :], False


def _kv_append(m: _Maker) -> tuple:
    tables = _tables(m)
    return (*m.heads(), *tables, m.cache(), m.cache(), m.lengths(), False)


def _attention(m: _Maker) -> tuple:
    if m.work.name == "training":  # without a cache
        return *m.heads(), True, None, None, False
    return m.heads()[0], m.cache(), m.cache(), True, None, m.lengths(), False


def _kv_append_quantized(m: _Maker) -> tuple:
    tables = _tables(m)
    caches = (*m.quantized_cache(), *m.quantized_cache())
    return (*m.heads(), *tables, *caches, m.lengths(), False)


def _attention_quantized(m: _Maker) -> tuple:
    q = m.heads()[0]
    return q, *m.quantized_cache(), *m.quantized_cache(), True, None, m.lengths()


def _linear(m: _Maker, C_out: int, C_in: int) -> tuple:
    return m.rows(C_in), m.randn(C_out, C_in, scale=C_in**-0.5)


def _linear_quantized(m: _Maker, C_out: int, C_in: int, bits: int, group_size: int) -> tuple:
    codes, scales = packed_shapes(C_out, C_in, bits, group_size)
    if m.device == "meta":
        packed = torch.empty(codes, dtype=torch.uint8, device="meta")
        sizes = torch.empty(scales, dtype=torch.float16, device="meta")
    else:
        drawn = {"generator": m.generator, "device": m.device}
        packed = torch.randint(256, codes, dtype=torch.uint8, **drawn)
        sizes = 0.5 + torch.rand(scales, dtype=torch.float32, **drawn)
        sizes = (sizes * C_in**-0.5 / 2 ** (bits - 1)).half()
    return m.rows(C_in), packed, sizes, None, C_out, bits, group_size


def _linear_swiglu(m: _Maker) -> tuple:
    return _linear(m, *m.matrices()["gate_up"])


def _linear_cross_entropy(m: _Maker) -> tuple:
    V, C = m.matrices()["head"]
    N = m.work.batch * m.work.tokens
    targets = torch.randint(V, (N,), generator=m.generator, device=m.generator.device).to(m.device)
    return m.randn(N, C), m.randn(V, C, scale=C**-0.5), targets, -100, False, False, True


def _linear_cross_entropy_quantized(m: _Maker) -> tuple:
    V, C = m.matrices()["head"]
    form = NAMED["int8"].head  # in "int4" too
    x, *weight = _linear_quantized(m, V, C, form.bits, form.group_size)
    targets = torch.randint(V, x.shape[:-1], generator=m.generator, device=m.generator.device)
    return x, *weight, targets.to(m.device), -100, False, True


_SINGLE = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "kv_append": _kv_append,
    "kv_append_quantized": _kv_append_quantized,
    "attention": _attention,
    "attention_quantized": _attention_quantized,
    "linear_swiglu": _linear_swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_quantized": _linear_cross_entropy_quantized,
}
# Which arguments of an op ask for results that only its gradient needs.
_FOR_GRADIENT = {
    "attention": slice(6, 7),
    "linear_cross_entropy": slice(4, 6),
    "linear_cross_entropy_quantized": slice(9, 10),
}
NAMES = (*_SINGLE, "linear", "linear_quantized", "linear_swiglu_quantized")


def workloads(
    op: str,
    config: LlamaConfig,
    work: Work,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    gradient: bool = False,
) -> dict[str, Callable[[int], tuple[Any, ...]]]:
    """What a model of this shape calls an op with.

    op        one of NAMES
    gradient  with what the public function asks for where a gradient is to be recorded
    device    "meta" for shapes alone: nothing is drawn
    Returns, by a name such as "linear head", a function of a seed that makes the arguments of one
    call in the order of the op's schema: normal numbers, never zeros, laid out as in the model.
    Raises ConfigError for another op.
    """

    def maker(function: Callable[..., tuple], *sizes: int) -> Callable[[int], tuple[Any, ...]]:
        def make(seed: int = 0) -> tuple[Any, ...]:
            args = list(function(_Maker(config, work, dtype, device, seed), *sizes))
            flags = _FOR_GRADIENT.get(op, slice(0))
            args[flags] = [gradient] * len(args[flags])
            return tuple(args)

        return make

    if op in _SINGLE:
        return {op: maker(_SINGLE[op])}
    matrices = _Maker(config, work, dtype, device, 0).matrices()
    if op == "linear":
        return {f"linear {name}": maker(_linear, *shape) for name, shape in matrices.items()}
    forms = {form: (q.mlp.bits, q.mlp.group_size) for form, q in NAMED.items()}
    if op == "linear_quantized":
        return {
            f"linear_quantized {name} {form}": maker(_linear_quantized, *shape, *sizes)
            for form, sizes in forms.items()
            for name, shape in matrices.items()
        }
    if op == "linear_swiglu_quantized":
        return {
            f"linear_swiglu_quantized {form}": maker(
                _linear_quantized, *matrices["gate_up"], *sizes
            )
            for form, sizes in forms.items()
        }
    raise ConfigError(f"no model calls an op named {op!r}; there are {', '.join(NAMES)}")
