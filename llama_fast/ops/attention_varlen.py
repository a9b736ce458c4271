"""Attention of sequences that lie one behind another, with keys that may lie elsewhere: in a cache,
in pages.

q (Tq, H, D), k and v (Tk, K, D); sequence i has the queries cum_q[i] … cum_q[i + 1] - 1, which are
the last of its keys, as in the op. Where queries and keys are of the same tokens, the op takes all
sequences in one call, as packed documents. Otherwise each sequence is a call, for which the values
of cum_q and of `Keys` are read: a GPU would be waited for.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import OP as ATTENTION
from .attention import lse_dtype


class Keys(NamedTuple):
    """Where keys and values are.

    cum    (n + 1,): sequence i has the keys cum[i] … cum[i + 1] - 1, where they lie in no pages
    used   (n,) how many keys of each sequence are valid; None: all
    pages  (n, pages of a sequence): which pages of k and v (pages, page size, K, D) hold its keys
    """

    cum: Tensor | None
    used: Tensor | None = None
    pages: Tensor | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_q: Tensor,
    keys: Keys,
    *,
    causal: bool = True,
    scale: float | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns o (Tq, H, D), zeros where a query sees no key or is of no sequence, and with
    `need_lse` the lse (H, Tq) beside it, for which no gradient is recorded."""
    if keys.used is None and packed(q, k, cum_q, keys.cum):
        documents = cum_q.to(torch.int32)
        o, lse = ATTENTION(
            q[None], k[None], v[None], causal, scale, None, need_lse, None, None, documents
        )
        return o[0], lse[0] if need_lse else lse
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sizes = (q.shape[1], q.shape[0]) if need_lse else (0,)
    lse = q.new_full(sizes, float("-inf"), dtype=lse_dtype(q.dtype))
    for i, at in enumerate(spans(cum_q)):
        own = q[None, at], _keys_of(i, k, keys), _keys_of(i, v, keys)
        if own[0].numel() and own[1].numel():
            result = ATTENTION(*own, causal, scale, None, need_lse)
            o[at] = result[0][0]
            if need_lse:
                lse[:, at] = result[1][0]
    return o, lse


def spans(cum: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise(cum.tolist())]


def packed(q: Tensor, k: Tensor, cum_q: Tensor, cum_k: Tensor | None) -> bool:
    """Whether each sequence attends to itself, and all tokens are of one."""
    if cum_k is None or q.shape[0] != k.shape[0]:
        return False
    same = is_same(cum_q, cum_k)
    if not q.is_cpu:  # values cannot be read without waiting for the GPU
        return same
    if not same and not torch.equal(cum_q, cum_k):
        return False
    return int(cum_q[0]) == 0 and int(cum_q[-1]) == q.shape[0]


def is_same(cum_q: Tensor, cum_k: Tensor) -> bool:
    """Whether both are one tensor, without reading their values."""
    return cum_q.data_ptr() == cum_k.data_ptr() and cum_q.shape == cum_k.shape


def _keys_of(i: int, x: Tensor, keys: Keys) -> Tensor:
    """The keys or values of sequence i, (1, S, K, D)."""
    if keys.pages is None:
        found = x[int(keys.cum[i]) : int(keys.cum[i + 1])]
    else:
        count = -(-int(keys.used[i]) // x.shape[1])
        found = x[keys.pages[i, :count].long()].flatten(0, 1)
    return found[None] if keys.used is None else found[None, : int(keys.used[i])]
