"""Our ops in torchtitan's models, as overrides of its components; any of them may be left out.

    torchrun … -m torchtitan.train … --override.imports llama_fast.engines.torchtitan.rms_norm \\
        llama_fast.engines.torchtitan.swiglu llama_fast.engines.torchtitan.rope

Parameters and checkpoints stay as they are. Under tensor parallelism the ops get DTensors, and
dtensor.py registers how they may be cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.rope import ComplexRoPE

from .. import ops
from . import dtensor  # noqa: F401  registers itself


class OurRMSNorm(RMSNorm):
    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        pass

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C). torch's own norm has other rounding points beside two dtypes."""
        if self.weight is None or x.dtype is not self.weight.dtype:
            return super().forward(x)
        return ops.rms_norm(x, self.weight, self.eps)


class OurFeedForward(FeedForward):
    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        pass

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


class OurRoPE(ComplexRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """query (B,T,H,D), key (B,T,K,D), rope_cache (B or 1,T,1,D/2) complex → both rotated."""
        table = rope_cache.squeeze(2)
        table = table[0] if table.shape[0] == 1 else table
        cos, sin = (part.contiguous() for part in torch.view_as_real(table).unbind(-1))
        return ops.rope(query, key, cos, sin, interleaved=True)


@override(target=RMSNorm.Config, exact=True, description="rms_norm of llama_fast")
def rms_norm(config: RMSNorm.Config) -> OurRMSNorm.Config:
    return derive(config, OurRMSNorm.Config)


@override(target=FeedForward.Config, exact=True, description="swiglu of llama_fast")
def swiglu(config: FeedForward.Config) -> OurFeedForward.Config:
    return derive(config, OurFeedForward.Config)


@override(target=ComplexRoPE.Config, exact=True, description="rope of llama_fast")
def rope(config: ComplexRoPE.Config) -> OurRoPE.Config:
    return derive(config, OurRoPE.Config)
