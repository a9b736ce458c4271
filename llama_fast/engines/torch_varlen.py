"""Our attention as the kernel behind torch's `varlen_attn`: sequences one behind another.

q (Tq, H, D), k and v (Tk, K, D); ops/attention_varlen.py says what belongs together, and computes
it. On a GPU the op serves calls alone in which queries and keys are of the same tokens; keys of a
cache would need values that the GPU has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention import BACKWARD
from ..ops.attention_varlen import Keys, attend, is_same, packed, spans
from .torch_kernels import TorchKernel, for_backward, unsupported


def forward(
    torch_kernel: TorchKernel,
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple:
    """Returns o (Tq,H,D), lse (H,Tq), and what belongs to dropout, of which there is none."""
    keys = Keys(cum_seq_k, seqused_k, block_table)
    causal, reasons = _causal(is_causal, window_size_left, window_size_right, max_k)
    reasons += unsupported("attention", query, key, value, dropout_p, return_debug_mask)
    reasons += _layout_reasons(query, cum_seq_q, keys)
    if alibi_slopes is not None:
        reasons.append("there are ALiBi slopes")
    if reasons:
        return torch_kernel(
            keyset,
            reasons,
            *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k),
            *(dropout_p, is_causal, return_debug_mask),
            scale=scale,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            seqused_k=seqused_k,
            alibi_slopes=alibi_slopes,
            block_table=block_table,
            num_splits=num_splits,
        )
    with torch.no_grad():
        o, lse = attend(
            query, key, value, cum_seq_q, keys, causal=causal, scale=scale, need_lse=True
        )
    return o, lse.to(torch.float32), *without_dropout(query)


def forward_into(
    torch_kernel: TorchKernel, keyset: Any, out: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """As `forward`, which writes o to `out` and returns lse."""

    def own(keyset: Any, reasons: list[str], *args: Any, **kwargs: Any) -> tuple:
        return None, torch_kernel(keyset, reasons, out, *args, **kwargs)

    o, lse, *_ = forward(own, keyset, *args, **kwargs)
    if o is not None:
        out.copy_(o)
    return lse


def backward(
    torch_kernel: TorchKernel,
    keyset: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    causal, reasons = _causal(is_causal, window_size_left, window_size_right, max_k)
    reasons += unsupported("attention_backward", query, key, value, dropout_p)
    reasons += _layout_reasons(query, cum_seq_q, Keys(cum_seq_k))
    if reasons:
        return torch_kernel(
            keyset,
            reasons,
            *(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k),
            *(dropout_p, is_causal, rng_state, unused),
            scale=scale,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
        )
    results = tuple(map(torch.zeros_like, (query, key, value)))
    with torch.no_grad():
        if packed(query, key, cum_seq_q, cum_seq_k):
            g, q, k, v, o, lse = (x[None] for x in (grad_out, query, key, value, out, logsumexp))
            documents = cum_seq_q.to(torch.int32)
            found = BACKWARD(g, q, k, v, o, for_backward(lse, q), causal, scale, None, documents)
            return tuple(result.copy_(x[0]) for result, x in zip(results, found, strict=True))
        for at, keys in zip(spans(cum_seq_q), spans(cum_seq_k), strict=True):
            g, q, k, v, o = (
                x[None] for x in (grad_out[at], query[at], key[keys], value[keys], out[at])
            )
            if not q.numel() or not k.numel():
                continue
            lse = for_backward(logsumexp[None, :, at], q)
            found = BACKWARD(g, q, k, v, o, lse, causal, scale, None)
            for result, where, x in zip(results, (at, keys, keys), found, strict=True):
                result[where] = x[0]
    return results


KERNELS = {
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_into,
    "_flash_attention_backward": backward,
}


def without_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state of the random numbers, twice, and the weights, as operators return them that used
    none and keep none."""
    device = query.device
    seed = torch.zeros(2, dtype=torch.uint64, device=device)
    offset = torch.zeros((), dtype=torch.uint64, device=device)
    return seed, offset, torch.empty(0, dtype=query.dtype, device=device)


def _causal(
    is_causal: bool, left: int | None, right: int | None, max_k: int
) -> tuple[bool, list[str]]:
    """Whether no query sees the keys behind its own, and why the window cannot be served."""
    reasons = []
    if left is not None and 0 <= left < max_k - 1:
        reasons.append(f"a window of {left} keys before each query; the op sees all of them")
    if right is not None and right > 0:
        reasons.append(f"a window of {right} keys behind each query")
    return is_causal or right == 0, reasons


def _layout_reasons(query: Tensor, cum_seq_q: Tensor | None, keys: Keys) -> list[str]:
    if cum_seq_q is None or query.ndim != 3:
        return ["query is not a row of sequences with cum_seq_q"]
    if keys.pages is None and keys.cum is None:
        return ["neither cum_seq_k nor a block table says where the keys are"]
    if keys.pages is not None and keys.used is None:
        return ["a block table without seqused_k"]
    if query.is_cpu:
        return []
    if keys.used is not None or keys.cum is None or not is_same(cum_seq_q, keys.cum):
        return ["keys other than those of the queries' own sequences"]
    return []
