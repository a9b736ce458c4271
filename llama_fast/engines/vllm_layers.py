"""Our ops in the places of vLLM's: operators of its IR, and layers that it finds by their names."""

import torch
from torch import Tensor
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding

from .. import ops
from . import NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op may be given these: on the CPU, of one dtype that kernels have, x by rows."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.stride(-1) == 1
        and all(other is not None and other.dtype is x.dtype for other in others)
    )


# vLLM compares the names of these arguments, their types and defaults with its own. variance_size
# is for a variance of the first elements alone.
def norm_served(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and alike(x, weight)


@ir.ops.rms_norm.register_impl(NAME, supports_args=norm_served)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    return ops.rms_norm(x, weight, epsilon)


def add_norm_served(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return variance_size is None and x_residual.stride(-1) == 1 and alike(x, x_residual, weight)


@ir.ops.fused_add_rms_norm.register_impl(NAME, supports_args=add_norm_served)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, x_residual, weight, epsilon)


@SiluAndMul.register_oot
class SwiGLU(SiluAndMul):
    def forward_cpu(self, x: Tensor) -> Tensor:
        """x (..., 2F), gate and then up → (..., F)."""
        return ops.swiglu(*x.chunk(2, dim=-1)) if alike(x) else super().forward_cpu(x)


class Rotation:
    """The forward pass of both kinds of rotary embeddings that Llama 3 has. Its tables stay rounded
    to the model's dtype, as vLLM and transformers have them."""

    def forward_cpu(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """positions (T,), query (T, H·D), key (T, K·D) → the rotated query and key."""
        whole = self.rotary_dim == self.head_size and positions.ndim == 1
        if not whole or not alike(query, key):
            return super().forward_cpu(positions, query, key)
        table = self._match_cos_sin_cache_dtype(query)[positions].float()
        q, k = (x.unflatten(-1, (-1, self.head_size))[None] for x in (query, key))
        rotated = ops.rope(q, k, *table.chunk(2, dim=-1), interleaved=not self.is_neox_style)
        return tuple(x[0].flatten(1) for x in rotated)


@RotaryEmbedding.register_oot
class Rope(Rotation, RotaryEmbedding):
    pass


@Llama3RotaryEmbedding.register_oot
class ScaledRope(Rotation, Llama3RotaryEmbedding):
    pass
