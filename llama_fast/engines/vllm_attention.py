"""Our attention in vLLM's backend for CPUs, for the steps that begin sequences.

Queries, keys and values are then of the same tokens: packed documents, one call of the op. Steps
that read the paged cache are vLLM's own kernel's, which reads it in place; it writes the cache too.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from .. import ops


@register_backend(AttentionBackendEnum.CPU_ATTN)
class Backend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type["Attention"]:
        return Attention


class Attention(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query and output (T, H, D), key and value (T, K, D), of which the first
        `num_actual_tokens` count → output, written."""
        scales = output_scale, output_block_scale
        step = attn_metadata
        if scales != (None, None) or step is None or not self._serves(query, key, step):
            return super().forward(layer, query, key, value, kv_cache, step, output, *scales)
        T = step.num_actual_tokens
        q, k, v = (x[None, :T] for x in (query, key, value))
        packed = {"scale": self.scale, "cu_seqlens": step.query_start_loc}
        output[:T] = ops.attention(q, k, v, **packed)[0]
        return output

    def _serves(self, query: Tensor, key: Tensor, step: CPUAttentionMetadata) -> bool:
        """Whether the op computes this step: causal, each token seeing all before it, and no keys
        but those of the step."""
        plain = (
            self.attn_type == "decoder"
            and self.kv_sharing_target_layer_name is None
            and self.alibi_slopes is None
            and self.sinks is None
            and self.sliding_window == -1
            and not self.logits_soft_cap
            and not self.is_fp8_kv_cache
            and step.causal is True
            and step.dynamic_causal is None
        )
        if not plain or key is None or query.dtype is not key.dtype:
            return False
        return step.max_query_len > 1 and torch.equal(step.query_start_loc.diff(), step.seq_lens)
