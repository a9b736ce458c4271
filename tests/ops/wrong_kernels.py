"""Kernels written like fast ones, sound or with a fault put in: the oracle lets all sound ones pass
and none of the others. Each takes the name of its fault, or "", and the arguments of its op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama_fast.dispatch import OPS, Op
from llama_fast.ops.attention import valid_only, visible
from llama_fast.ops.inputs import randn
from llama_fast.ops.kv_append import places
from llama_fast.ops.logits import gradient_dtype
from llama_fast.ops.quantized_kv import dequantize, quantize
from llama_fast.ops.quantized_layout import dequantize as dequantize_weight
from llama_fast.ops.rope import rotate

from .oracle import Expected, of_op

TILE = 16  # of the sums and of the online softmax


def half_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def product(fault: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (…, M, n) times b (…, n, N), tile by tile in one accumulator."""
    if fault == "TF32 products":
        a, b = (x.view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32) for x in (a, b))
    n = a.shape[-1]
    if fault == "a dropped term":
        n -= 1
    elif fault == "a dropped tail":
        n = n // TILE * TILE
    total = torch.zeros(*a.shape[:-1], b.shape[-1])
    for start in range(0, n, TILE):
        part = slice(start, min(start + TILE, n))
        total = total + a[..., part].float() @ b[..., part, :].float()
        if fault == "half-precision accumulation":
            total = total.to(half_of(a.dtype)).float()
    return total


def linear(fault, x, weight, *defaults):
    return (product(fault, x, weight.t()).to(x.dtype),)


def swiglu(fault, gate, up):
    if fault == "the halves exchanged":
        gate, up = up, gate
    s = gate.float()
    if fault == "a sigmoid in half precision":
        weight = torch.sigmoid(s).to(torch.bfloat16).float()
    else:
        weight = torch.sigmoid(s)
    return ((s * weight).to(gate.dtype) * up,)


def rms_norm(fault, x, weight, eps):
    squares = x.float().square()
    C = x.shape[-1]
    if fault == "divided by the padded width":
        C += -C % TILE
    mean = product(fault, squares, torch.ones(squares.shape[-1], 1)) / C
    r = 1 / (mean.sqrt() + eps) if fault == "eps outside the root" else torch.rsqrt(mean + eps)
    return ((x.float() * r).to(x.dtype) * weight,)


def add_rms_norm(fault, x, residual, weight, eps):
    total = x + residual
    normed = x if fault == "the sum forgotten" else total
    return *rms_norm("", normed, weight, eps), total


def rope(fault, q, k, cos, sin, interleaved):
    if fault == "a transposed pair":
        interleaved = not interleaved
    if fault == "turned backwards":
        sin = -sin
    if fault == "the position before":
        cos, sin = (x.roll(1, -2) for x in (cos, sin))
    return tuple(rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved) for x in (q, k))


def kv_append(fault, q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, *defaults):
    b, t, p = places(q, lengths, k_cache.shape[1], cos.shape[0])
    of_p = cos[p, None], sin[p, None]
    to = p.clamp(1) - 1 if fault == "a slot before" else p
    k_cache[b, to], v_cache[b, to] = rotate(k[b, t], *of_p, interleaved), v[b, t]
    rotated = torch.zeros_like(q).contiguous()
    rotated[b, t] = rotate(q[b, t], *of_p, interleaved)
    return rotated, k_cache, v_cache


def kv_append_quantized(
    fault, q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scale, v_scale
):
    b, t, p = places(q, lengths, k_cache.shape[1], cos.shape[0])
    of_p = cos[p, None], sin[p, None]
    caches = (k_cache, k_scale), (v_cache, v_scale)
    new = rotate(k[b, t], *of_p, interleaved), v[b, t]
    for x, (values, scale) in zip(new, caches, strict=True):
        values[b, p], scale[b, p] = quantize(x)
        if fault == "values cut, not rounded":
            values[b, p] = (x.float() / scale[b, p, :, None]).trunc().to(torch.int8)
    rotated = torch.zeros_like(q).contiguous()
    rotated[b, t] = rotate(q[b, t], *of_p, interleaved)
    return rotated, k_cache, v_cache, k_scale, v_scale


def attention(fault, q, k, v, causal, scale, lengths, need_lse, *defaults):
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    if fault == "an ignored length":
        lengths = None
    k, v = valid_only(k, lengths), valid_only(v, lengths)
    scale = 1 / math.sqrt(D) if scale is None else scale
    if fault == "a wrong scale":
        scale = 1 / math.sqrt(D + 8)
    of_head = torch.arange(H) // (H // K)
    if fault == "a wrong group":
        of_head = torch.arange(H) % K
    q_, k_, v_ = (x.transpose(1, 2).float() for x in (q, k[:, :, of_head], v[:, :, of_head]))
    seen = visible(T, S, causal, lengths, q.device)[:, :, 0]
    if fault == "a mask one key too wide":
        seen = visible(T, S, causal, torch.tensor([S + 1]), q.device)[:, :, 0]
    if fault == "a mask one key too narrow":
        seen = visible(T, S, causal, torch.tensor([S - 1]), q.device)[:, :, 0]
    m = torch.full((B, H, T, 1), -math.inf)
    total, acc = torch.zeros(B, H, T, 1), torch.zeros(B, H, T, D)
    keys = S // TILE * TILE if fault == "a dropped tail" else S
    for start in range(0, keys, TILE):
        tile = slice(start, min(start + TILE, keys))
        scores = (q_ @ k_[:, :, tile].mT) * scale
        scores = scores.masked_fill(~seen[..., tile], -math.inf)
        new = torch.maximum(m, scores.amax(-1, keepdim=True))
        shift = new.masked_fill(new == -math.inf, 0)
        p, rescale = torch.exp(scores - shift), torch.exp(m - shift)
        if fault == "a stale maximum":
            rescale = rescale.where(m == -math.inf, 1)
        total = total * (1 if fault == "a stale denominator" else rescale) + p.sum(-1, keepdim=True)
        acc, m = acc * rescale + p @ v_[:, :, tile], new
        if fault == "half-precision accumulation":
            total, acc = (x.to(half_of(q.dtype)).float() for x in (total, acc))
    o = (acc / total).masked_fill(total == 0, 0).transpose(1, 2).to(q.dtype).contiguous()
    kind = torch.float32 if q.dtype.itemsize == 2 else torch.float64
    lse = torch.empty(0, dtype=kind)
    if need_lse:
        lse = (total.log() if fault == "lse without the maximum" else m + total.log())[..., 0].to(
            kind
        )
    return o, lse


def attention_quantized(
    fault, q, k, v, causal, scale, lengths, need_lse, k_scale, v_scale, cu_seqlens=None
):
    if fault == "the scale of the key before":
        k_scale = k_scale.roll(1, 1)
    if fault == "the scale of the head before":
        v_scale = v_scale.roll(1, 2)
    k, v = dequantize(k, k_scale, q.dtype), dequantize(v, v_scale, q.dtype)
    return attention(fault, q, k, v, causal, scale, lengths, need_lse)


def attention_backward(fault, grad, q, k, v, o, lse, causal, scale, lengths):
    _, T, H, D = q.shape
    _, S, K, _ = k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    k_, v_ = (valid_only(x, lengths).repeat_interleave(H // K, 2) for x in (k, v))
    g, q_, k_, v_, o_ = (x.transpose(1, 2).float() for x in (grad, q, k_, v_, o))
    seen = visible(T, S, causal, lengths, q.device)[:, :, 0]
    scores = (q_ @ k_.mT * scale).masked_fill(~seen, -math.inf)
    weights = torch.exp(scores - lse[..., None]).float().masked_fill(~seen, 0)
    mean = (g * o_).sum(-1, keepdim=True)
    if fault == "no sum of the row":
        mean = torch.zeros_like(mean)
    d_scores = weights * (g @ v_.mT - mean)
    of_k = d_scores if fault == "dk without the scale" else d_scores * scale
    dq, dk, dv = d_scores * scale @ k_, of_k.mT @ q_, weights.mT @ g
    if fault == "dv of half the queries":
        dv = weights[:, :, T // 2 :].mT @ g[:, :, T // 2 :]
    dk, dv = (x.unflatten(1, (K, H // K)) for x in (dk, dv))
    dk = dk[:, :, -1] if fault == "dk of the last head of a group" else dk.sum(2)
    results = (dq, dk, dv.sum(2))
    return tuple(x.transpose(1, 2).to(q.dtype).contiguous() for x in results)


def linear_cross_entropy(
    fault, x, weight, targets, ignore_index, need_x, need_weight, reduction, *defaults
):
    rows, C = x.reshape(-1, x.shape[-1]), x.shape[-1]
    target = targets.flatten()
    logits = product("", rows, weight.t()).to(x.dtype).float()
    kept = (target != ignore_index)[:, None]
    if fault == "ignored rows counted":
        count = len(rows)
    else:
        count = int(kept.sum())
    largest = logits.amax(-1, keepdim=True)
    if fault == "the last block of classes lost":
        exps = torch.exp(logits - largest)
        exps[:, logits.shape[1] // TILE * TILE :] = 0
    else:
        exps = torch.exp(logits - largest)
    total = exps.sum(-1, keepdim=True)
    at = target.where(kept[:, 0], 0)[:, None]
    losses = (largest + total.log() - logits.gather(1, at)).where(kept, 0)
    if fault == "the last block of rows lost":
        losses = losses[: (len(rows) - 1) // TILE * TILE]
    share = 1 / count if reduction == "mean" else 1.0
    P = exps / total
    if fault != "no target in the gradient":
        P = P.scatter_add(1, at, torch.full_like(P[:, :1], -1))
    d_logits = (P * share).where(kept, 0).to(x.dtype)
    dx, dw = product("", d_logits, weight), product("", d_logits.t(), rows)
    dtype = gradient_dtype(x.dtype)
    return losses.sum() * share, dx.to(dtype).view(*x.shape[:-1], C), dw.to(dtype)


def linear_quantized(fault, x, values, scales, minima, C_out, bits, group_size, *defaults):
    if fault == "a zero point off by one":
        minima = minima - scales
    if fault == "the scales of another group":
        scales = scales.roll(1, 1)
    weight = dequantize_weight(values, scales, minima, bits, group_size, torch.float32)
    return (product(fault, x, weight[:C_out, : x.shape[-1]].t()).to(x.dtype),)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALF_SUM = "half-precision accumulation"


class Fault(NamedTuple):
    """A kernel, the case of its op that shows the fault, and in which dtypes it does."""

    kernel: Callable[..., tuple]
    name: str
    case: str
    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)

    def __str__(self) -> str:
        return f"{self.kernel.__name__}, {self.name}"


FAULTS = [
    Fault(linear, "a dropped term", "16 rows"),
    Fault(linear, "a dropped tail", "16 rows"),
    Fault(linear, HALF_SUM, "decode"),
    Fault(linear, "TF32 products", "40 rows", (F32,)),
    Fault(linear_quantized, "a zero point off by one", "4 bits, group of 32, with minima"),
    Fault(linear_quantized, "the scales of another group", "8 bits, group of 64, symmetric"),
    Fault(swiglu, "the halves exchanged", "odd"),
    Fault(swiglu, "a sigmoid in half precision", "1b prefill", (F32, F16)),
    Fault(rms_norm, "divided by the padded width", "odd"),
    Fault(rms_norm, "eps outside the root", "tiny"),
    Fault(rms_norm, HALF_SUM, "8b decode", (F32, F16)),
    Fault(rms_norm, "a dropped tail", "odd"),
    Fault(add_rms_norm, "the sum forgotten", "one row"),
    Fault(rope, "a transposed pair", "1b prefill"),
    Fault(rope, "turned backwards", "8b decode, interleaved"),
    Fault(rope, "the position before", "1b prefill"),
    Fault(kv_append, "a slot before", "chunk"),
    Fault(kv_append_quantized, "values cut, not rounded", "8 bits, chunk"),
    Fault(attention, "a stale maximum", "1b heads"),
    Fault(attention, "a stale denominator", "long decode"),
    Fault(attention, "a dropped tail", "long decode"),
    Fault(attention, "a mask one key too wide", "1b heads"),
    Fault(attention, "a mask one key too narrow", "1b heads"),
    Fault(attention, "a wrong group", "chunk against a cache"),
    Fault(attention, "a wrong scale", "8b decode"),
    Fault(attention, "an ignored length", "ragged"),
    Fault(attention, HALF_SUM, "long decode"),
    Fault(attention, "lse without the maximum", "for a gradient"),
    Fault(attention_quantized, "the scale of the key before", "8 bits, 8b decode"),
    Fault(attention_quantized, "the scale of the head before", "8 bits, 8b decode"),
    Fault(attention_backward, "no sum of the row", "for a gradient"),
    Fault(attention_backward, "dk without the scale", "for a gradient"),
    Fault(attention_backward, "dk of the last head of a group", "for a gradient"),
    Fault(attention_backward, "dv of half the queries", "for a gradient"),
    Fault(linear_cross_entropy, "ignored rows counted", "some ignored"),
    Fault(linear_cross_entropy, "the last block of classes lost", "some ignored"),
    Fault(linear_cross_entropy, "the last block of rows lost", "some ignored"),
    Fault(linear_cross_entropy, "no target in the gradient", "some ignored"),
]


@functools.cache
def judged_by(kernel: Callable, case: str, dtype: torch.dtype) -> tuple[Op, tuple, list[Expected]]:
    """The op of a kernel, the arguments of a case, and what the oracle wants for them."""
    op, args = arguments(kernel.__name__, case, dtype)
    return op, args, of_op(op, args)


def arguments(name: str, case_name: str, dtype: torch.dtype) -> tuple[Op, tuple]:
    of_gradient = name.endswith("_backward")
    op = OPS[name.removesuffix("_backward").removesuffix("_quantized")]
    (case,) = (case for case in op.cases() if case.name == case_name)
    generator = torch.Generator().manual_seed(0)
    args = case.make(generator, dtype, "cpu")
    if of_gradient:
        q, k, v, causal, scale, lengths, *_ = args
        o, lse = attention("", *args)
        grad = randn(generator, *q.shape, dtype=dtype)
        return OPS[name], (grad, q, k, v, o, lse, causal, scale, lengths)
    return op, args
