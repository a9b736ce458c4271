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

from ..dispatch import Case, Cost, Op
from ..errors import GradientError, ShapeError
from . import checks, quantized_kv
from .inputs import randn
from .model_inputs import ModelInputs
from .quantized_kv import dequantize, quantize
from .rms_norm import accumulate

BLOCK = 2**22  # scores that the backward reference holds at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
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
    k_scale, v_scale  (B, S, K) float32, of int8 keys and values: what each head's vector is
             multiplied by
    Returns o (B, T, H, D), contiguous, of q's dtype; zeros where a query sees no key. Raises
    ShapeError when the arguments do not fit, and GradientError when a gradient is to be recorded
    through 8-bit keys and values. On a GPU the values of `lengths` are not checked.
    """
    grad = torch.is_grad_enabled()
    if k_scale is None and v_scale is None:
        need_lse = grad and (q.requires_grad or k.requires_grad or v.requires_grad)
        return OP(q, k, v, causal, scale, lengths, need_lse)[0]
    if grad and q.requires_grad:
        raise no_gradient()
    return OP(q, k, v, causal, scale, lengths, False, k_scale, v_scale)[0]


def no_gradient() -> GradientError:
    return GradientError(
        "attention has no gradient against keys and values in 8 bits, but q requires one: "
        "call it under torch.no_grad(), or give tensors of q's dtype"
    )


def check(q, k, v, causal, scale, lengths, need_lse=False, k_scale=None, v_scale=None) -> None:
    checks.ndim("attention", "q", q, 4, "(B, T, H, D)")
    checks.ndim("attention", "k", k, 4, "(B, S, K, D)")
    B, _, H, D = q.shape
    _, S, K, _ = k.shape
    quantized_kv.check("attention", q, (B, S, K, D), "k", k, k_scale, "v", v, v_scale)
    check_groups("attention", H, K, D)
    if lengths is not None:
        checks.lengths("attention", lengths, q)


def check_groups(op: str, H: int, K: int, D: int) -> None:
    if K == 0 or H % K or D == 0:
        raise ShapeError(
            f"{op}: q has H = {H} heads of D = {D} and k has K = {K}; "
            "D must be positive and H a multiple of K > 0"
        )


def check_lengths(lengths: Tensor | None, S: int) -> None:
    """The values, where reading them costs nothing: on the CPU."""
    if lengths is not None and lengths.is_cpu and lengths.numel() and (lengths > S).any():
        row = int(lengths.argmax())
        raise too_long(row, int(lengths[row]), S)


def too_long(row: int, length: int, S: int) -> ShapeError:
    return ShapeError(
        f"attention: lengths[{row}] is {length} and k has S = {S} keys; a length is at most S: "
        "pass a longer k and v, or shorter lengths"
    )


def visible(T: int, S: int, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool, broadcastable to (B, K, G, T, S)."""
    if lengths is None:
        lengths = torch.tensor([S], device=device)
    lengths = lengths.view(-1, 1, 1, 1, 1)
    s = torch.arange(S, device=device)
    if not causal:
        return (s < lengths).expand(-1, -1, -1, T, -1)
    # From -T down no query sees a key; a length near the least integer must not wrap around.
    return s <= lengths.clamp(min=-T) - T + torch.arange(T, device=device).view(-1, 1)


def valid_only(x: Tensor, lengths: Tensor | None) -> Tensor:
    """k or v with zeros behind each row's length, where anything may lie: 0 · NaN is NaN."""
    if lengths is None:
        return x
    behind = torch.arange(x.shape[1], device=x.device) >= lengths.view(-1, 1)
    return x.masked_fill(behind[:, :, None, None], 0)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def head_dim_reasons(D: int) -> list[str]:
    """Why no kernel serves heads of D elements, whatever its backend; nothing where one may."""
    return [f"D is {D}; it must be a multiple of 8 up to 256"] if D % 8 or D > 256 else []


def softmax_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the keys seen, in float32; zeros for the others and for a query without keys."""
    scores = scores.to(accumulate(scores.dtype)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).masked_fill(~seen, 0)


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
) -> tuple[Tensor, Tensor]:
    check_lengths(lengths, k.shape[1])
    _, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    if k_scale is not None:
        k, v = dequantize(k, k_scale, q.dtype), dequantize(v, v_scale, q.dtype)
    k, v = valid_only(k, lengths), valid_only(v, lengths)
    grouped = q.unflatten(2, (K, H // K))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k) * scale
    seen = visible(T, S, causal, lengths, q.device)
    weights = softmax_weights(scores, seen).to(q.dtype)
    o = torch.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape).contiguous()
    lse = q.new_empty(0, dtype=lse_dtype(q.dtype))
    if need_lse:
        scores = scores.detach().to(accumulate(q.dtype)).masked_fill(~seen, float("-inf"))
        nothing = scores.new_full((*scores.shape[:-1], 1), float("-inf"))  # where there is no key
        lse = torch.cat((scores, nothing), -1).logsumexp(-1)
        lse = lse.reshape(q.shape[0], H, T).to(lse_dtype(q.dtype))
    return o, lse


def fake(
    q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes the weights with a softmax, a block of queries at a time, so that memory grows
    with S alone; o and lse are for the kernels."""
    check_lengths(lengths, k.shape[1])
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    dtype = accumulate(q.dtype)
    kf, vf = valid_only(k, lengths).to(dtype), valid_only(v, lengths).to(dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(kf), torch.zeros_like(vf)
    seen = visible(T, S, causal, lengths, q.device)
    step = max(1, BLOCK // max(1, B * H * S))
    for t in range(0, T, step):
        block = slice(t, t + step)
        qf = q[:, block].unflatten(2, (K, H // K)).to(dtype)
        gf = grad[:, block].unflatten(2, (K, H // K)).to(dtype)
        scores = torch.einsum("btkgd,bskd->bkgts", qf, kf) * scale
        weights = softmax_weights(scores, seen[..., block, :])
        dv += torch.einsum("bkgts,btkgd->bskd", weights, gf)
        d_weights = torch.einsum("btkgd,bskd->bkgts", gf, vf)
        mean = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * scale
        dq[:, block] = torch.einsum("bkgts,bskd->btkgd", d_scores, kf).flatten(2, 3)
        dk += torch.einsum("bkgts,btkgd->bskd", d_scores, qf)
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def backward_check(grad, q, k, v, o, lse, causal, scale, lengths) -> None:
    check(q, k, v, causal, scale, lengths)
    checks.same_kind("attention_backward", "q", q, grad=grad, o=o)
    checks.shape("attention_backward", "grad", grad, q.shape, "q's shape")
    checks.shape("attention_backward", "o", o, q.shape, "q's shape")
    B, T, H, _ = q.shape
    checks.shape("attention_backward", "lse", lse, (B, H, T), "(B, H, T)")


def backward_fake(grad, q, k, v, o, lse, causal, scale, lengths) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save(inputs: tuple, output: tuple) -> tuple:
    q, k, v, causal, scale, lengths, _, k_scale, _ = inputs
    if k_scale is not None:
        raise no_gradient()
    return (q, k, v, *output, lengths), (causal, scale)


def gradient(
    saved: tuple, scalars: tuple, needed: tuple, grad: Tensor, unused: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, lengths = saved
    if lse.ndim != 3:  # the op was called without need_lse, which the public function sets
        o, lse = OP(q, k, v, *scalars, lengths, True)
    return *BACKWARD(grad, q, k, v, o, lse, *scalars, lengths), *[None] * 6


def cost(q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None) -> Cost:
    """Each tensor once, of k and v the valid keys, with a scale for each of their heads where they
    are in 8 bits; 4·D FLOPs for each query and key it sees."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths)
    head = D * k.element_size() + (0 if k_scale is None else k_scale.element_size())
    held = 2 * keys * k.shape[2] * head
    return Cost(bytes=2 * q.numel() * q.element_size() + held, flops=4 * D * H * pairs)


def backward_cost(grad, q, k, v, o, lse, causal, scale, lengths) -> Cost:
    """Each tensor once; five products, where the forward pass has two."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths)
    elements = 4 * q.numel() + 4 * keys * k.shape[2] * D
    return Cost(bytes=elements * q.element_size() + lse.nbytes, flops=10 * D * H * pairs)


def variant(q, k, v, causal, scale, lengths, need_lse, k_scale=None, v_scale=None) -> str:
    return "" if k_scale is None else "int8"


def keys_and_pairs(q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None) -> tuple[int, int]:
    """The valid keys of all rows, and the pairs of a query and a key that it sees. Lengths of the
    meta device, or those of a trace, have no values: all S keys are valid then."""
    B, T, _, _ = q.shape
    S = k.shape[1]
    known = type(lengths) is Tensor and not lengths.is_meta
    rows = [max(0, n) for n in lengths.tolist()] if known else [S] * B
    if causal:  # query t of a row of n keys sees n - T + 1 + t of them
        pairs = sum(n * (n + 1) // 2 - max(0, n - T) * max(0, n - T + 1) // 2 for n in rows)
    else:
        pairs = T * sum(rows)
    return sum(rows), pairs


def dense(B, T, S, H, K, D, causal=True, scale=None, lengths=None, spread=1.0, need_lse=False):
    """What makes the arguments of a case from contiguous normal numbers."""

    def make(g, dtype, device):
        at = {"dtype": dtype, "device": device}
        return (
            randn(g, B, T, H, D, scale=spread, **at),
            randn(g, B, S, K, D, **at),
            randn(g, B, S, K, D, **at),
            causal,
            scale,
            None if lengths is None else torch.tensor(lengths, device=device),
            need_lse,
            None,
            None,
        )

    return make


def cases() -> list[Case]:
    return [*float_cases(), *int8_cases()]


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    def make(int8: bool) -> tuple:
        q, k, v = m.heads()
        lengths, scales = None, (None, None)
        if int8 or m.work.name != "training":  # against a cache
            (k, k_scale), (v, v_scale) = m.cache(int8), m.cache(int8)
            lengths, scales = m.lengths(), (k_scale, v_scale)
        return q, k, v, True, None, lengths, m.gradient and not int8, *scales

    return {"attention": lambda: make(False), "attention int8": lambda: make(True)}


def float_cases() -> list[Case]:
    def heads_first(g, dtype, device):
        """transformers' (B, H, T, D) tensors, transposed to this op's order."""
        at = {"dtype": dtype, "device": device}
        q, k, v = (randn(g, 2, heads, 19, 64, **at).transpose(1, 2) for heads in (6, 2, 2))
        return q, k, v, True, None, None, False, None, None

    def cache(g, dtype, device):
        """A cache (B, K, S, D) with room to spare, of which each row holds its own length."""
        at = {"dtype": dtype, "device": device}
        k, v = (randn(g, 3, 2, 150, 64, **at).transpose(1, 2) for _ in range(2))
        lengths = torch.tensor([150, 1, 77], device=device)
        return randn(g, 3, 1, 8, 64, **at), k, v, True, None, lengths, False, None, None

    def fused(g, dtype, device):
        """Slices of one projection (B, T, (H + 2K)·D)."""
        qkv = randn(g, 1, 21, 8, 72, dtype=dtype, device=device)
        return qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], True, None, None, False, None, None

    return [
        Case("one key", dense(1, 1, 1, 2, 1, 8)),
        Case("prefill", dense(2, 17, 17, 4, 2, 64)),
        Case("1b heads", dense(1, 40, 40, 32, 8, 64)),
        Case("8b decode", dense(1, 1, 130, 32, 8, 128)),
        Case("chunk against a cache", dense(2, 9, 50, 6, 2, 128, lengths=[50, 31])),
        Case("long", dense(1, 1023, 1023, 1, 1, 16), dtypes=(torch.float32, torch.bfloat16)),
        Case("long decode", dense(1, 1, 2085, 4, 1, 32)),
        Case("few queries, long", dense(2, 3, 1100, 4, 2, 24, lengths=[1100, 555])),
        Case("group of 3", dense(1, 70, 70, 6, 2, 40)),
        Case("group of 7", dense(2, 1, 65, 7, 1, 96, lengths=[65, 64])),
        Case("group of 16", dense(1, 2, 35, 16, 1, 256)),
        Case("group of 8, wide heads", dense(1, 12, 20, 8, 1, 256)),
        Case("more queries than keys", dense(1, 23, 9, 2, 2, 64)),
        Case("no keys", dense(2, 3, 0, 2, 1, 64)),
        Case("no queries", dense(2, 0, 5, 2, 1, 64)),
        Case("ragged", dense(5, 20, 33, 4, 2, 64, lengths=[33, 20, 7, 0, -4])),
        Case("ragged decode", dense(4, 1, 33, 8, 2, 128, lengths=[33, 0, 1, 17])),
        Case("not causal", dense(2, 19, 45, 4, 1, 72, causal=False, lengths=[45, 13])),
        Case("not causal, one query", dense(2, 1, 90, 4, 2, 64, causal=False, scale=0.3)),
        Case("sharp", dense(1, 33, 33, 4, 2, 64, spread=8.0)),
        Case("for a gradient", dense(2, 37, 37, 6, 2, 64, need_lse=True)),
        Case(
            "for a gradient, ragged",
            dense(3, 9, 70, 4, 2, 40, lengths=[70, 3, 0], need_lse=True),
        ),
        Case("for a gradient, one query", dense(2, 1, 600, 4, 1, 64, need_lse=True)),
        Case("heads first", heads_first),
        Case("cache", cache),
        Case("slices of a fused projection", fused),
    ]


def int8_cases() -> list[Case]:
    def quantized(make):
        """A case of attention, with its keys and values rounded and laid out as they were."""

        def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
            values, scale = quantize(x)
            like = torch.empty_strided(x.shape, x.stride(), dtype=torch.int8, device=x.device)
            return like.copy_(values), scale

        def make_quantized(g, dtype, device):
            q, k, v, causal, scale, lengths, *_ = make(g, dtype, device)
            (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
            return q, k, v, causal, scale, lengths, False, k_scale, v_scale

        return make_quantized

    def cache(g, dtype, device):
        """One layer of a cache: scales (B, K, S) too, more slots than are given, zeros among them,
        and heads of very different sizes."""
        k, v = (randn(g, 3, 2, 700, 64, dtype=torch.float32) for _ in range(2))
        k[:, 1] *= 1e-3
        v[:, 0] *= 50
        v[0, 1, 5] = 0
        k[2, 0, 40:43] = 0
        parts = (
            part.to(device)[:, :, :600].transpose(1, 2) for x in (k, v) for part in quantize(x)
        )
        k, k_scale, v, v_scale = parts
        lengths = torch.tensor([600, 1, 77], device=device)
        q = randn(g, 3, 1, 8, 64, dtype=dtype, device=device)
        return q, k, v, True, None, lengths, False, k_scale, v_scale

    def outliers(g, dtype, device):
        """Channels of the keys that are far larger than the others, as published models have."""
        q = randn(g, 1, 1, 4, 128, dtype=dtype, device=device)
        k, v = (randn(g, 1, 90, 1, 128, dtype=torch.float32) for _ in range(2))
        k[..., 7] *= 20
        k, k_scale, v, v_scale = (x.to(device) for x in (*quantize(k), *quantize(v)))
        return q, k, v, True, 0.02, None, False, k_scale, v_scale

    few = {
        "wide, a tail of 8": quantized(dense(2, 1, 131, 6, 2, 72, lengths=[131, 9])),
        "a group of 5": quantized(dense(1, 1, 70, 5, 1, 128)),
        "three splits": quantized(dense(1, 1, 2100, 8, 2, 64)),
        "two queries a split apart": quantized(dense(1, 2, 1026, 4, 2, 64)),
        "decode and prefill": quantized(dense(3, 21, 60, 4, 1, 64, lengths=[60, 3, -1])),
        "one layer": cache,
        "outliers": outliers,
    }
    usual = [case for case in float_cases() if "gradient" not in str(case)]
    return [
        *(Case(f"8 bits, {c}", quantized(c.make), c.dtypes) for c in usual),
        *(Case(f"8 bits, {name}", make) for name, make in few.items()),
    ]


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
    cost=backward_cost,
)
