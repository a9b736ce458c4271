"""Attention: o = softmax(scale · q·kᵀ) v, causal or not, with grouped-query heads.

Vaswani et al., "Attention Is All You Need" (2017); grouped queries: Ainslie et al., "GQA" (2023);
kernels compute it tile by tile with an online softmax: Dao et al., "FlashAttention" (2022).

Shapes    q (B, T, H, D); k, v (B, S, K, D); lengths (B,) int64 → o (B, T, H, D)
          query head h uses KV head h // G, with G = H / K
Layout    q, k, v are contiguous in D, their other dims have any stride (transposed views, slices of
          a fused projection, caches); o is contiguous
Keys      row b has the keys s < lengths[b] (S without lengths), and its T queries are the last T of
          them: query t has the position lengths[b] - T + t. Causal: it sees the keys s ≤ position.
          A query that sees no key, such as one at a negative position (left padding), gets zeros.
          What lies in k and v behind lengths[b] is never used, be it NaN.
Rounding  q·kᵀ to q's dtype, times scale; softmax in float32; the weights to q's dtype, times v

Gradient, with P the weights and g the gradient of o:
    dv = Pᵀ g      dP = g vᵀ      dS = P ∘ (dP - rowsum(P ∘ dP))      dq = scale dS k
    dk = scale dSᵀ q      summed over the G query heads of a KV head

Beside o the op returns each query's lse = log Σ exp(score), (B, H, T), -inf where it sees no key.
Backward kernels remake the weights from it without another softmax, exp(score - lse), and take
rowsum(P ∘ dP) from o and g, to which it is equal. An error of lse is one of every weight, so it is
float32 beside the half types and float64 beside float32. It is empty unless `need_lse`, which the
public function sets where a gradient is to be recorded.
"""

from __future__ import annotations

import math

import torch

from ..dispatch import OPS, Case, Cost, Op
from ..errors import GradientError, ShapeError
from . import checks
from .inputs import randn
from .quantized_kv import QuantizedKV, is_quantized
from .rms_norm import accumulate

BLOCK = 2**22  # scores that the backward reference holds at a time


def attention(
    q: torch.Tensor,
    k: torch.Tensor | QuantizedKV,
    v: torch.Tensor | QuantizedKV,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped-query heads.

    q        (B, T, H, D), float32, bfloat16 or float16, contiguous in D
    k, v     (B, S, K, D), of q's dtype and device; H is a multiple of K. Or each a QuantizedKV of
             that shape, which the op `attention_quantized` reads
    causal   a query sees the keys up to its own position only
    scale    factor of the scores; 1/√D when None
    lengths  (B,) int64, the valid keys of each row, at most S; S when None. The T queries are the
             last T of them. Zero or less: the row sees nothing.
    Returns o (B, T, H, D), contiguous, of q's dtype; zeros where a query sees no key. Raises
    ShapeError when the arguments do not fit, and GradientError when a gradient is to be recorded
    through a QuantizedKV. On a GPU the values of `lengths` are not checked.
    """
    grad = torch.is_grad_enabled()
    if is_quantized("attention", k, v):
        if grad and q.requires_grad:
            raise GradientError(
                "attention has no gradient against keys and values in 8 bits, but q requires one: "
                "call it under torch.no_grad(), or give tensors"
            )
        return OPS["attention_quantized"](q, *k, *v, causal, scale, lengths)
    need_lse = grad and (q.requires_grad or k.requires_grad or v.requires_grad)
    return OP(q, k, v, causal, scale, lengths, need_lse)[0]


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool = False,
) -> None:
    checks.same_kind("attention", "q", q, k=k, v=v)
    checks.ndim("attention", "q", q, 4, "(B, T, H, D)")
    checks.ndim("attention", "k", k, 4, "(B, S, K, D)")
    B, _, H, D = q.shape
    _, S, K, _ = k.shape
    checks.shape("attention", "k", k, (B, S, K, D), "(B, S, K, D) with q's B and D")
    checks.shape("attention", "v", v, (B, S, K, D), "k's shape")
    check_groups("attention", H, K, D)
    if lengths is not None:
        checks.lengths("attention", lengths, q)


def check_groups(op: str, H: int, K: int, D: int) -> None:
    if K == 0 or H % K or D == 0:
        raise ShapeError(
            f"{op}: q has H = {H} heads of D = {D} and k has K = {K}; "
            "D must be positive and H a multiple of K > 0"
        )


def check_lengths(lengths: torch.Tensor | None, S: int) -> None:
    """The values, where reading them costs nothing: on the CPU."""
    if lengths is not None and lengths.is_cpu and lengths.numel() and (lengths > S).any():
        row = int(lengths.argmax())
        raise too_long(row, int(lengths[row]), S)


def too_long(row: int, length: int, S: int) -> ShapeError:
    return ShapeError(
        f"attention: lengths[{row}] is {length} and k has S = {S} keys; a length is at most S: "
        "pass a longer k and v, or shorter lengths"
    )


def visible(
    T: int, S: int, causal: bool, lengths: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which keys each query sees: bool, broadcastable to (B, K, G, T, S)."""
    if lengths is None:
        lengths = torch.tensor([S], device=device)
    lengths = lengths.view(-1, 1, 1, 1, 1)
    s = torch.arange(S, device=device)
    if not causal:
        return (s < lengths).expand(-1, -1, -1, T, -1)
    # From -T down no query sees a key; a length near the least integer must not wrap around.
    return s <= lengths.clamp(min=-T) - T + torch.arange(T, device=device).view(-1, 1)


def valid_only(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
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


def softmax_weights(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys seen, in float32; zeros for the others and for a query without keys."""
    scores = scores.to(accumulate(scores.dtype)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).masked_fill(~seen, 0)


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_lengths(lengths, k.shape[1])
    _, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, H, _ = q.shape
    lse = q.new_empty((B, H, T) if need_lse else 0, dtype=lse_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def backward_eager(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def backward_check(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> None:
    check(q, k, v, causal, scale, lengths)
    checks.same_kind("attention_backward", "q", q, grad=grad, o=o)
    checks.shape("attention_backward", "grad", grad, q.shape, "q's shape")
    checks.shape("attention_backward", "o", o, q.shape, "q's shape")
    B, T, H, _ = q.shape
    checks.shape("attention_backward", "lse", lse, (B, H, T), "(B, H, T)")


def backward_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save(inputs: tuple, output: tuple) -> tuple:
    q, k, v, causal, scale, lengths, _ = inputs
    return (q, k, v, *output, lengths), (causal, scale)


def gradient(
    saved: tuple, rest: tuple, needed: tuple, grad: torch.Tensor, unused: torch.Tensor
) -> tuple:
    q, k, v, o, lse, lengths = saved
    if lse.ndim != 3:  # the op was called without need_lse, which the public function sets
        o, lse = OP(q, k, v, *rest, lengths, True)
    return *BACKWARD(grad, q, k, v, o, lse, *rest, lengths), None, None, None, None


def cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
    need_lse: bool,
) -> Cost:
    """Each tensor once, of k and v the valid keys; 4·D FLOPs for each query and key it sees."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths)
    elements = 2 * q.numel() + 2 * keys * k.shape[2] * D
    return Cost(bytes=elements * q.element_size(), flops=4 * D * H * pairs)


def backward_cost(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    lengths: torch.Tensor | None,
) -> Cost:
    """Each tensor once; five products, where the forward pass has two."""
    _, _, H, D = q.shape
    keys, pairs = keys_and_pairs(q, k, causal, lengths)
    elements = 4 * q.numel() + 4 * keys * k.shape[2] * D
    return Cost(bytes=elements * q.element_size() + lse.nbytes, flops=10 * D * H * pairs)


def keys_and_pairs(
    q: torch.Tensor, k: torch.Tensor, causal: bool, lengths: torch.Tensor | None
) -> tuple[int, int]:
    """The valid keys of all rows, and the pairs of a query and a key that it sees. Lengths of the
    meta device have no values: all S keys are valid then."""
    B, T, _, _ = q.shape
    S = k.shape[1]
    known = lengths is not None and not lengths.is_meta
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
        )

    return make


def cases() -> list[Case]:
    def heads_first(g, dtype, device):
        """transformers' (B, H, T, D) tensors, transposed to this op's order."""
        at = {"dtype": dtype, "device": device}
        q, k, v = (randn(g, 2, heads, 19, 64, **at).transpose(1, 2) for heads in (6, 2, 2))
        return q, k, v, True, None, None, False

    def cache(g, dtype, device):
        """A cache (B, K, S, D) with room to spare, of which each row holds its own length."""
        at = {"dtype": dtype, "device": device}
        k, v = (randn(g, 3, 2, 150, 64, **at).transpose(1, 2) for _ in range(2))
        lengths = torch.tensor([150, 1, 77], device=device)
        return randn(g, 3, 1, 8, 64, **at), k, v, True, None, lengths, False

    def fused(g, dtype, device):
        """Slices of one projection (B, T, (H + 2K)·D)."""
        qkv = randn(g, 1, 21, 8, 72, dtype=dtype, device=device)
        return qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], True, None, None, False

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


OP = Op(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, bool causal=True, float? scale=None, "
    "Tensor? lengths=None, bool need_lse=False) -> (Tensor, Tensor)",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    auxiliary=1,
    cost=cost,
    cases=cases,
)
BACKWARD = Op(
    name="attention_backward",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, "
    "float? scale, Tensor? lengths) -> (Tensor, Tensor, Tensor)",
    check=backward_check,
    eager=backward_eager,
    fake=backward_fake,
    cost=backward_cost,
)
