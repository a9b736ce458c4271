"""Attention: o = softmax(scale · q·kᵀ) v, causal or not, with grouped-query heads.

Vaswani et al., "Attention Is All You Need" (2017); grouped queries: Ainslie et al., "GQA" (2023);
kernels compute it tile by tile with an online softmax: Dao et al., "FlashAttention" (2022).

Shapes    q (B, T, H, D); k, v (B, S, K, D); lengths (B,) int64 → o (B, T, H, D)
          query head h uses KV head h // G, with G = H / K
          keys and values may be in 8 bits: k, v int8 with k_scale, v_scale (B, S, K) float32, and
          k[b,s,h,d] stands for k_scale[b,s,h] · k[b,s,h,d] (quantized_kv.py)
Layout    q, k, v are contiguous in D, their other dims have any stride (transposed views, slices of
          a fused projection, caches), as have the scales; o is contiguous
Keys      row b has the keys s < lengths[b] (S without lengths), and its T queries are the last T of
          them: query t has the position lengths[b] - T + t. Causal: it sees the keys s ≤ position.
          A query that sees no key, such as one at a negative position (left padding), gets zeros.
          What lies in k and v behind lengths[b] is never used, be it NaN.
Documents packed in one row (B = 1, S = T) are given by cu_seqlens (n + 1,) int32 (documents.py):
          each gives what it gives alone, and sees nothing of the others
Rounding  8-bit k and v to q's dtype; q·kᵀ to q's dtype, times scale; softmax in float32; the
          weights to q's dtype, times v

Gradient, with P the weights and g the gradient of o:
    dv = Pᵀ g      dP = g vᵀ      dS = P ∘ (dP - rowsum(P ∘ dP))      dq = scale dS k
    dk = scale dSᵀ q      summed over the G query heads of a KV head
8-bit keys and values have none: a cache is read where no gradient is recorded.

Beside o the op returns each query's lse = log Σ exp(score), (B, H, T), -inf where it sees no key.
Backward kernels remake the weights from it without another softmax, exp(score - lse), and take
rowsum(P ∘ dP) from o and g, to which it is equal. An error of lse is one of every weight, so it is
float32 beside the half types and float64 beside float32. It is empty unless `need_lse`, which the
public function sets where a gradient is to be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import Cost, Op, Sharding
from . import documents
from .attention_cases import cases
from .attention_checks import backward_check, check, check_lengths, no_gradient
from .model_inputs import ModelInputs
from .quantized_kv import dequantize
from .rms_norm import accumulate

# Scores that the reference, and its backward pass, hold at a time: memory grows with S alone, and a
# chunk of a prompt of 131,072 tokens takes no more of it than one of 2,048.
BLOCK, BACKWARD_BLOCK = 2**26, 2**22
LONG_ROW = 4096  # keys, from which on a row's weights are added up in float64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped-query heads.

    q        (B, T, H, D), float32, bfloat16 or float16, contiguous in D
    k, v     (B, S, K, D), of q's dtype and device; H is a multiple of K. Or int8, with scales
    causal   a query sees the keys up to its own position only
    scale    factor of the scores; 1/√D when None
    lengths  (B,) int64, the valid keys of each row, at most S; S when None. The T queries are the
             last T of them. Zero or less: the row sees nothing.
    cu_seqlens  (n + 1,) int32, from 0 to T: document i of the one row (B = 1, S = T) is the tokens
             cu_seqlens[i] … cu_seqlens[i + 1] - 1, and sees itself alone. It may be empty. Not
             together with lengths or scales
    k_scale, v_scale  (B, S, K) float32, of int8 keys and values: what each head's vector is
             multiplied by
    Returns o (B, T, H, D), contiguous, of q's dtype; zeros where a query sees no key. Raises
    ShapeError when the arguments do not fit, and GradientError when a gradient is to be recorded
    through 8-bit keys and values. On a GPU the values of `lengths` and `cu_seqlens` are not
    checked.
    """
    grad = torch.is_grad_enabled()
    if k_scale is None and v_scale is None:
        need_lse = grad and (q.requires_grad or k.requires_grad or v.requires_grad)
        return OP(q, k, v, causal, scale, lengths, need_lse, None, None, cu_seqlens)[0]
    if grad and q.requires_grad:
        raise no_gradient()
    return OP(q, k, v, causal, scale, lengths, False, k_scale, v_scale, cu_seqlens)[0]


def visible(
    T: int,
    S: int,
    causal: bool,
    lengths: Tensor | None,
    device: torch.device,
    block: slice = slice(None),
) -> Tensor:
    """Which keys each query of a block sees: bool, broadcastable to (B, K, G, its queries, S)."""
    if lengths is None:
        lengths = torch.tensor([S], device=device)
    lengths = lengths.view(-1, 1, 1, 1, 1)
    s, t = torch.arange(S, device=device), torch.arange(T, device=device)[block].view(-1, 1)
    if not causal:
        return (s < lengths).expand(-1, -1, -1, len(t), -1)
    # From -T down no query sees a key; a length near the least integer must not wrap around.
    return s <= lengths.clamp(min=-T) - T + t


def blocks(T: int, scores: int, most: int) -> list[slice]:
    """The T queries, which have so many scores each, as many at a time as have `most`."""
    step = max(1, most // max(1, scores))
    return [slice(t, t + step) for t in range(0, T, step)] or [slice(0, 0)]


def valid_only(x: Tensor, lengths: Tensor | None) -> Tensor:
    """k or v with zeros behind each row's length, where anything may lie: 0 · NaN is NaN."""
    if lengths is None:
        return x
    behind = torch.arange(x.shape[1], device=x.device) >= lengths.view(-1, 1)
    return x.masked_fill(behind[:, :, None, None], 0)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def softmax_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the keys seen, in float32; zeros for the others and for a query without keys."""
    # torch adds a row up in order. Where one weight is nearly all of it, each of thousands of small
    # ones is rounded to that one's units, which float32 results would show.
    exact = scores.dtype is torch.float32 and scores.shape[-1] > LONG_ROW
    scores = scores.to(accumulate(scores.dtype)).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float64 if exact else None)
    return weights.to(scores.dtype).masked_fill(~seen, 0)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    need_lse: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        return eager_packed(q, k, v, causal, scale, need_lse, cu_seqlens)
    check_lengths(lengths, k.shape[1])
    _, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    if k_scale is not None:
        k, v = dequantize(k, k_scale, q.dtype), dequantize(v, v_scale, q.dtype)
    k, v = valid_only(k, lengths), valid_only(v, lengths)
    o, lse = [], []
    for block in blocks(T, q.shape[0] * H * S, BLOCK):
        grouped = q[:, block].unflatten(2, (K, H // K))
        scores = torch.einsum("btkgd,bskd->bkgts", grouped, k) * scale
        seen = visible(T, S, causal, lengths, q.device, block)
        weights = softmax_weights(scores, seen).to(q.dtype)
        o.append(torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3))
        if need_lse:
            scores = scores.detach().to(accumulate(q.dtype)).masked_fill(~seen, float("-inf"))
            nothing = scores.new_full((*scores.shape[:-1], 1), float("-inf"))  # where is no key
            lse.append(torch.cat((scores, nothing), -1).logsumexp(-1).flatten(1, 2))
    exact = lse_dtype(q.dtype)
    return (
        torch.cat(o, 1).contiguous(),
        torch.cat(lse, -1).to(exact) if need_lse else q.new_empty(0, dtype=exact),
    )


def eager_packed(q, k, v, causal, scale, need_lse, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Each document alone; their results one behind another."""
    results = [
        eager(q[:, at], k[:, at], v[:, at], causal, scale, None, need_lse)
        for at in slices(cu_seqlens, q.shape[1])
    ]
    if not results:
        return eager(q, k, v, causal, scale, None, need_lse)
    o, lse = zip(*results, strict=True)
    return torch.cat(o, 1), torch.cat(lse, -1)


def slices(cu_seqlens: Tensor, T: int) -> list[slice]:
    """Of the tokens, one for each document that has any."""
    spans = documents.spans("attention", cu_seqlens, T)
    return [slice(begin, end) for begin, end in spans if end > begin]


def fake(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None, cu_seqlens=None
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T) if need_lse else 0, dtype=lse_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def backward_eager(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the weights with a softmax, a block of queries at a time; o and lse are for the
    kernels."""
    if cu_seqlens is not None:
        return backward_packed(grad, q, k, v, o, lse, causal, scale, cu_seqlens)
    check_lengths(lengths, k.shape[1])
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    dtype = accumulate(q.dtype)
    kf, vf = valid_only(k, lengths).to(dtype), valid_only(v, lengths).to(dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(kf), torch.zeros_like(vf)
    for block in blocks(T, B * H * S, BACKWARD_BLOCK):
        qf = q[:, block].unflatten(2, (K, H // K)).to(dtype)
        gf = grad[:, block].unflatten(2, (K, H // K)).to(dtype)
        scores = torch.einsum("btkgd,bskd->bkgts", qf, kf) * scale
        weights = softmax_weights(scores, visible(T, S, causal, lengths, q.device, block))
        dv += torch.einsum("bkgts,btkgd->bskd", weights, gf)
        d_weights = torch.einsum("btkgd,bskd->bkgts", gf, vf)
        mean = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * scale
        dq[:, block] = torch.einsum("bkgts,bskd->btkgd", d_scores, kf).flatten(2, 3)
        dk += torch.einsum("bkgts,btkgd->bskd", d_scores, qf)
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def backward_packed(
    grad, q, k, v, o, lse, causal, scale, cu_seqlens
) -> tuple[Tensor, Tensor, Tensor]:
    """Each document alone; their results one behind another."""
    results = [
        backward_eager(grad[:, at], q[:, at], k[:, at], v[:, at], o, lse, causal, scale, None)
        for at in slices(cu_seqlens, q.shape[1])
    ]
    if not results:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return tuple(torch.cat(of_one, 1) for of_one in zip(*results, strict=True))


def backward_fake(
    grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save(inputs: tuple, output: tuple) -> tuple:
    q, k, v, causal, scale, lengths, _, k_scale, _, cu_seqlens = inputs
    if k_scale is not None:
        raise no_gradient()
    return (q, k, v, *output, lengths, cu_seqlens), (causal, scale)


def gradient(
    saved: tuple, scalars: tuple, needed: tuple, grad: Tensor, unused: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, lengths, cu_seqlens = saved
    if lse.ndim != 3:  # the op was called without need_lse, which the public function sets
        o, lse = OP(q, k, v, *scalars, lengths, True, None, None, cu_seqlens)
    return *BACKWARD(grad, q, k, v, o, lse, *scalars, lengths, cu_seqlens), *[None] * 7


def cost(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None, cu_seqlens=None
) -> Cost:
    """Each tensor once, of k and v the valid keys, with a scale for each of their heads where they
    are in 8 bits; 4·D FLOPs for each query and key it sees."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths, cu_seqlens)
    head = D * k.element_size() + (0 if k_scale is None else k_scale.element_size())
    held = 2 * keys * k.shape[2] * head
    return Cost(bytes=2 * q.numel() * q.element_size() + held, flops=4 * D * H * pairs)


def backward_cost(grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None) -> Cost:
    """Each tensor once; five products, where the forward pass has two."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths, cu_seqlens)
    elements = 4 * q.numel() + 4 * keys * k.shape[2] * D
    return Cost(bytes=elements * q.element_size() + lse.nbytes, flops=10 * D * H * pairs)


def sharding(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None, cu_seqlens=None
) -> Sharding:
    """By rows and by heads: each KV head with the query heads that use it."""
    lse = "BHT" if need_lse else "-"
    return Sharding(f"BTHD, BSKD, BSKD, B, BSK, BSK, - -> BTHD, {lse}", "B HK")


def variant(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None, cu_seqlens=None
) -> str:
    return "int8" if k_scale is not None else "packed" if cu_seqlens is not None else ""


def keys_and_pairs(
    q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[int, int]:
    """The valid keys of all rows, and the pairs of a query and a key that it sees. Lengths of the
    meta device, or those of a trace, have no values: all S keys are valid then, of one document."""
    B, T, _, _ = q.shape
    S = k.shape[1]
    if has_values(cu_seqlens):
        sizes = [end - begin for begin, end in documents.spans("attention", cu_seqlens, T)]
        return T, sum(n * (n + 1) // 2 if causal else n * n for n in sizes)
    known = has_values(lengths)
    rows = [max(0, n) for n in lengths.tolist()] if known else [S] * B
    if causal:  # query t of a row of n keys sees n - T + 1 + t of them
        pairs = sum(n * (n + 1) // 2 - max(0, n - T) * max(0, n - T + 1) // 2 for n in rows)
    else:
        pairs = T * sum(rows)
    return sum(rows), pairs


def has_values(x: Tensor | None) -> bool:
    return type(x) is Tensor and not x.is_meta


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    def make(int8: bool) -> tuple:
        q, k, v = m.heads()
        lengths, scales = None, (None, None)
        if int8 or m.work.name != "training":  # against a cache
            (k, k_scale), (v, v_scale) = m.cache(int8), m.cache(int8)
            lengths, scales = m.lengths(), (k_scale, v_scale)
        return q, k, v, True, None, lengths, m.gradient and not int8, *scales, None

    return {"attention": lambda: make(False), "attention int8": lambda: make(True)}


OP = Op(
    name="attention",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("k_scale", "v_scale"),
    forward_only=("int8",),
    non_differentiable=1,
    sharding=sharding,
    cost=cost,
    cases=cases,
    variant=variant,
    at_model_size=at_model_size,
)
BACKWARD = Op(
    name="attention_backward",
    check=backward_check,
    eager=backward_eager,
    fake=backward_fake,
    sharding=Sharding("BTHD, BTHD, BSKD, BSKD, BTHD, BHT, B, - -> BTHD, BSKD, BSKD", "B HK"),
    cost=backward_cost,
)
