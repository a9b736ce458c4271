"""Who has `attention` in one function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .names import LIBRARIES, TORCH

OP = "attention"


def sdpa(kind: str | None, q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    """Its mask is aligned at the first key, so a prompt that others precede has none here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            *heads_first,
            is_causal=causal and q.shape[1] > 1,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return o.transpose(1, 2)

    if kind is None:
        return run()
    with sdpa_kernel(getattr(SDPBackend, kind)):
        return run()


def of_flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def of_flashinfer(q: Tensor, k: Tensor, v: Tensor, causal: bool, *_: Any) -> Tensor:
    import flashinfer

    if q.shape[1] == 1:
        o = flashinfer.single_decode_with_kv_cache(q[0, 0], k[0], v[0], kv_layout="NHD")
        return o[None, None]
    o = flashinfer.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=causal, kv_layout="NHD")
    return o[None]


BASELINES = {
    "torch": partial(sdpa, None),
    "torch cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "torch flash": partial(sdpa, "FLASH_ATTENTION"),
    "torch efficient": partial(sdpa, "EFFICIENT_ATTENTION"),
    "torch math": partial(sdpa, "MATH"),
    "flash-attn": of_flash_attn,
    "flashinfer": of_flashinfer,
}


def limits(
    name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Any, lengths: Any, *_: Any
) -> list[str]:
    T, S = q.shape[1], k.shape[1]
    reasons = []
    if lengths is not None and bool((lengths != S).any()):
        reasons.append(f"{name} is asked for no lengths here, and they are not all {S}")
    if name in TORCH and causal and 1 < T != S:
        reasons.append(f"SDPA's causal mask is aligned at the first key, and {T} queries see {S}")
    if name == "flashinfer" and q.shape[0] != 1:
        reasons.append("flashinfer's functions for one sequence serve no batch")
    if name in LIBRARIES and q.dtype is torch.float32:
        reasons.append(f"{name} takes half types alone")
    return reasons
