"""Keys and values in 8 bits: how they are rounded, what a result depends on, what is refused."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from llama_fast import attention as plain_attention
from llama_fast import explain, kv_append, use_backend
from llama_fast.backends import cpu, triton
from llama_fast.dispatch import OPS
from llama_fast.errors import BackendError, GradientError, ShapeError
from llama_fast.ops import quantized_kv
from llama_fast.ops.quantized_kv import dequantize
from llama_fast.ops.rope import tables

from ..cuda_host import host
from .backends import CUDA_HOST, on, unless
from .oracle import assert_accurate, of_op
from .test_kv_append import arguments as append_arguments

BACKENDS = ["eager", "cpu"] if cpu.isas() else ["eager"]
ON_TRITON = pytest.param(
    "triton", marks=unless("" if triton.INTERPRETED else "this needs Triton's interpreter")
)
ON_CUDA = pytest.param(CUDA_HOST, marks=unless(host.why_not()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Attention of CUDA takes the half types.
SERVED = [
    *((backend, dtype) for backend in BACKENDS for dtype in DTYPES),
    *(pytest.param("triton", dtype, marks=ON_TRITON.marks) for dtype in DTYPES),
    *(pytest.param(CUDA_HOST, dtype, marks=ON_CUDA.marks) for dtype in DTYPES[1:]),
]
bf16 = torch.bfloat16


class KV(NamedTuple):
    """Keys or values: int8, and their scales."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize(x: torch.Tensor) -> KV:
    return KV(*quantized_kv.quantize(x))


def attention(q, k: KV, v: KV, **options) -> torch.Tensor:
    return plain_attention(q, k.values, v.values, k_scale=k.scales, v_scale=v.scales, **options)


def append(q, k, v, cos, sin, k_cache: KV, v_cache: KV, lengths, **options) -> torch.Tensor:
    caches = (k_cache.values, v_cache.values)
    scales = {"k_scale": k_cache.scales, "v_scale": v_cache.scales}
    return kv_append(q, k, v, cos, sin, *caches, lengths, **scales, **options)


def made(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(B, T, S, H, K, D, dtype=bf16):
    k, v = (quantize(made(B, S, K, D, dtype=dtype, seed=i)) for i in (1, 2))
    return made(B, T, H, D, dtype=dtype), k, v


def rows_of(x: KV, rows: slice) -> KV:
    return KV(*(part[rows] for part in x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_within_half_a_step(dtype):
    x = made(5, 7, 3, 64, dtype=dtype) * torch.tensor([1e-6, 1.0, 3e3]).to(dtype)[:, None]
    x[0, 0] = 0
    values, scales = quantize(x)
    assert values.dtype is torch.int8 and scales.dtype is torch.float32
    error = (dequantize(values, scales, torch.float64) - x.double()).abs()
    assert (error <= scales.double()[..., None] * 0.5001).all()
    assert (values.abs().amax(-1)[scales > 0] == 127).all()
    assert not values[0, 0].any() and not scales[0, 0].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    x = made(2, 3, 8)
    x[1, 2, 5] = value
    kv = quantize(x)
    back = dequantize(*kv, torch.float32)
    assert not kv.values[1, 2].any() and not back[1, 2].isfinite().any()
    assert back[0].isfinite().all() and back[1, :2].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, ON_TRITON, ON_CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_cache_holds_what_a_cache_of_floats_holds_but_rounded(backend, dtype, interleaved):
    q, k, v, cos, sin, k_cache, v_cache, lengths = append_arguments()
    q, k, v, k_cache, v_cache = (x.to(dtype) for x in (q, k, v, k_cache, v_cache))
    coded = [quantize(torch.zeros_like(k_cache)) for _ in "kv"]
    with on(backend):
        plain = kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved=interleaved)
        found = append(q, k, v, cos, sin, *coded, lengths, interleaved=interleaved)
    assert torch.equal(found, plain)
    for exact, kv in zip((k_cache, v_cache), coded, strict=True):
        for b, length in enumerate(lengths.tolist()):
            new = slice(length - q.shape[1], length)
            assert torch.equal(kv.values[b, new], quantize(exact[b, new]).values)
            assert torch.equal(kv.scales[b, new], quantize(exact[b, new]).scales)
            assert not kv.scales[b, length:].any() and not kv.scales[b, : new.start].any()


@pytest.mark.parametrize("backend", [*BACKENDS, ON_TRITON, ON_CUDA])
def test_appending_keeps_a_bad_head_to_itself(backend):
    args = list(append_arguments())
    args[1][1, 2, 1, 3] = math.nan
    args[2][0, 0, 0, 0] = math.inf
    args[5:7] = coded = [quantize(cache) for cache in args[5:7]]
    with on(backend):
        append(*args)
    k, v = (dequantize(*kv, torch.float32) for kv in coded)
    bad_k, bad_v = (~x.isfinite().all(-1) for x in (k, v))
    assert bad_k.nonzero().tolist() == [[1, 3, 1]] and bad_v.nonzero().tolist() == [[0, 2, 0]]


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("T", [1, 3, 40])
def test_what_lies_behind_a_length_is_not_used(backend, dtype, T):
    q, k, v = inputs(3, T, 90, 8, 2, 64, dtype)
    lengths = torch.tensor([90, 41, 1])
    with on(backend):
        expected = attention(q, k, v, lengths=lengths)
        for kv in (k, v):
            kv.values[1, 41:], kv.scales[1, 41:] = 127, math.nan
            kv.values[2, 1:], kv.scales[2, 1:] = -127, math.inf
        found = attention(q, k, v, lengths=lengths)
    assert expected.isfinite().all() and torch.equal(found, expected)


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", cpu.isas())
def test_a_row_depends_on_itself_alone(isa, dtype):
    """Neither on the rows beside it, be they of many queries, nor on the padding that those cause,
    nor on the number of threads."""
    T, S = 21, 2100
    q, k, v = inputs(4, T, S, 8, 2, 64, dtype)
    lengths = [1, 2100, 3, 1300]
    before = torch.get_num_threads()
    try:
        with cpu.use_isa(isa), use_backend("cpu", strict=True):
            together = attention(q, k, v, lengths=torch.tensor(lengths))
            torch.set_num_threads(3)
            assert torch.equal(attention(q, k, v, lengths=torch.tensor(lengths)), together)
            for b, length in enumerate(lengths):
                one, queries = slice(b, b + 1), min(T, length)
                alone = attention(
                    q[one, T - queries :],
                    rows_of(k, one),
                    rows_of(v, one),
                    lengths=torch.tensor([length]),
                )
                assert torch.equal(together[one, T - queries :], alone), length
                assert not together[b, : T - queries].any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_bad_number_reaches_its_own_heads_alone(backend, dtype, T, which):
    q, k, v = inputs(2, T, 50, 4, 2, 64, dtype)
    if which == "q":
        q[1, T - 1, 2, 9] = math.nan
    else:
        kv = k if which == "k" else v
        kv.values[1, 3, 1], kv.scales[1, 3, 1] = 0, math.nan
    with on(backend):
        o = attention(q, k, v)
    assert o[0].isfinite().all() and o[1, :, :2].isfinite().all()
    assert not o[1, T - 1, 2].isfinite().any()


@pytest.mark.parametrize("backend", [*BACKENDS, ON_TRITON, ON_CUDA])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("growth", [0, 4])
def test_small_values_lose_nothing_in_float16(backend, T, growth):
    """Their weights times their scales would lie among float16's smallest numbers, or below; and
    the scales of a row may differ by far."""
    q, k, _ = inputs(2, T, 300, 4, 2, 64, torch.float16)
    v = made(2, 300, 2, 64, seed=3) * 1e-3 * torch.logspace(0, growth, 300)[:, None, None]
    v = quantize(v)
    args = (q, k.values, v.values, True, None, None, False, k.scales, v.scales)
    op = OPS["attention"]
    with on(backend):
        assert_accurate(op(*args), of_op(op, args), f"small values, T {T}")


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("ratio", [1, 300, 1e3, 1e5, 1e7])
def test_a_row_that_attends_to_a_small_value_has_it(backend, dtype, T, ratio):
    """An attention sink: the scale of its value is far below that of all other keys."""
    q = made(1, T, 4, 64, dtype=dtype)
    k = torch.zeros(1, 150, 2, 64)
    k[:, 37] = 3
    v = made(1, 150, 2, 64, seed=8) * 64
    v[:, 37] /= ratio
    q, k, v = q.abs() * 4 + 2, quantize(k), quantize(v)
    args = (q, k.values, v.values, False, None, None, False, k.scales, v.scales)
    op = OPS["attention"]
    wanted = of_op(op, args)
    assert wanted[0].exact.abs().max() < 300 / ratio  # no other key has a part in it
    with on(backend):
        assert_accurate(op(*args), wanted, f"a value {ratio} times smaller")


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("scale", [1.3e8, 1e30])
def test_scores_of_any_finite_size(backend, dtype, T, scale):
    """Equal ones, of which each has the same weight, and one that is above all others."""
    if backend == "eager" and dtype == torch.float16:
        pytest.skip("its scores are rounded to float16, which has no such numbers")
    _, _, v = inputs(1, T, 150, 4, 2, 64, dtype)
    q, ones = torch.ones(1, T, 4, 64, dtype=dtype), torch.ones(1, 150, 2, 64)
    mean = dequantize(*v, dtype).double().mean(1)
    with on(backend):
        o = attention(q, quantize(-ones), v, causal=False, scale=scale)
        for h in range(4):
            error = (o[0, :, h].double() - mean[0, h // 2]).abs().max()
            assert error <= torch.finfo(dtype).eps
        ones[:, 70] = 2
        o = attention(q, quantize(ones), v, causal=False, scale=scale)
        for h in range(4):
            one = dequantize(*v, dtype)[0, 70, h // 2].double()
            assert (o[0, :, h].double() - one).abs().max() <= torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_beyond_the_cache_is_refused(backend):
    q, k, v = inputs(2, 1, 9, 4, 2, 64)
    with (
        use_backend(backend, strict=True),
        pytest.raises(ShapeError, match=r"lengths\[1\] is 10 and k has S = 9"),
    ):
        attention(q, k, v, lengths=torch.tensor([9, 10]))


Q, K, V = inputs(2, 3, 9, 4, 2, 64, torch.float32)
ABSENT = KV(made(2, 9, 2, 64), None)
BAD = {
    "values that are floats": (Q, K, ABSENT, "one of k_scale and v_scale is given; give both"),
    "keys that are floats": (Q, ABSENT, V, "one of k_scale and v_scale is given; give both"),
    "floats with scales": (
        Q, K._replace(values=made(2, 9, 2, 64)), V, "k is torch.float32; with scales it must be"
    ),
    "no scales": (
        Q, K._replace(scales=None), V._replace(scales=None), "8-bit keys and values need k_scale"
    ),
    "keys' dtype": (
        Q, K._replace(values=K.values.short()), V, "k is torch.int16; with scales it must be torch"
    ),
    "scales' dtype": (
        Q, K, V._replace(scales=V.scales.half()), "v_scale is torch.float16; with scales it must be"
    ),
    "scales' shape": (
        Q, K._replace(scales=K.scales[:, :8]), V, r"k_scale has shape \(2, 8, 2\).*\(B, S, K\)"
    ),
    "fewer values": (Q, K, rows_of(V, slice(1)), r"v has shape \(1, 9, 2, 64\)"),
    "heads": (Q[:, :, :3], K, V, "q has H = 3 heads of D = 64 and k has K = 2"),
    "devices": (Q, K._replace(scales=K.scales.to("meta")), V, "k_scale is on meta and q on cpu"),
    "whole numbers": (Q.long(), K, V, "q is torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    *args, says = BAD[name]
    with pytest.raises(ShapeError, match=says):
        attention(*args)


def test_a_cache_of_which_a_half_is_in_8_bits_is_refused():
    args = list(append_arguments())
    args[5], args[6] = quantize(args[5]), KV(args[6], None)
    with pytest.raises(ShapeError, match="kv_append: one of k_scale and v_scale is given"):
        append(*args)
    args[6] = quantize(args[6].values[:, :7])
    with pytest.raises(ShapeError, match=r"v_cache has shape \(2, 7, 2, 16\)"):
        append(*args)


def test_a_gradient_is_refused():
    q = Q.clone().requires_grad_()
    with pytest.raises(GradientError, match=r"in 8 bits.*torch\.no_grad\(\)"):
        attention(q, K, V)
    with torch.no_grad():
        attention(q, K, V)
    k = made(2, 3, 2, 16).requires_grad_()
    args = list(append_arguments())
    args[5:7] = [quantize(cache) for cache in args[5:7]]
    with pytest.raises(GradientError, match="kv_append has no gradient, but k requires"):
        append(args[0], k, *args[2:])
    with pytest.raises(GradientError, match=r"in 8 bits.*torch\.no_grad\(\)"):
        scales = {"k_scale": K.scales, "v_scale": V.scales}
        torch.ops.llama_fast.attention(q, K.values, V.values, **scales)


def test_a_backend_says_what_it_cannot_serve():
    scales = {"k_scale": K.scales, "v_scale": V.scales}
    decision = explain("attention", Q, K.values, V.values, **scales)
    assert decision.chosen == ("cpu" if cpu.isas() else "eager")
    odd = inputs(2, 3, 9, 4, 2, 12, torch.float32)
    apart = KV(torch.empty(2, 9, 2, 128, dtype=torch.int8)[..., ::2], K.scales)
    with use_backend("triton", strict=True):
        with pytest.raises(BackendError, match="D is 12; it must be a multiple of 8"):
            attention(*odd)
        with pytest.raises(BackendError, match="k has stride 2 in its last dim"):
            attention(Q, apart, V)
        with pytest.raises(BackendError, match=r"scale is -1\.0; it must be positive"):
            attention(Q, K, V, scale=-1.0)


def test_tables_of_the_model_serve_both_caches():
    """The op of 8 bits takes the same tables, of more positions than the cache has slots."""
    q, k, v, _, _, k_cache, v_cache, lengths = append_arguments()
    cos, sin = tables(torch.Generator().manual_seed(1), 99, q.shape[-1] // 2, device="cpu")
    coded = [quantize(cache) for cache in (k_cache, v_cache)]
    expected = kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths)
    assert torch.equal(append(q, k, v, cos, sin, *coded, lengths), expected)
