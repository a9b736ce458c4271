"""Keys and values in 8 bits: how they are rounded, what a result depends on, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast import QuantizedKV, attention, explain, kv_append, use_backend
from llama_fast.backends import cpu, triton
from llama_fast.dispatch import OPS
from llama_fast.errors import BackendError, GradientError, ShapeError
from llama_fast.ops.quantized_kv import dequantize, quantize
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


def made(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(B, T, S, H, K, D, dtype=bf16):
    k, v = (quantize(made(B, S, K, D, dtype=dtype, seed=i)) for i in (1, 2))
    return made(B, T, H, D, dtype=dtype), k, v


def rows_of(x: QuantizedKV, rows: slice) -> QuantizedKV:
    return QuantizedKV(*(part[rows] for part in x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_is_within_half_a_step(dtype):
    x = made(5, 7, 3, 64, dtype=dtype) * torch.tensor([1e-6, 1.0, 3e3]).to(dtype)[:, None]
    x[0, 0] = 0
    codes, scales = quantize(x)
    assert codes.dtype is torch.int8 and scales.dtype is torch.float32
    error = (dequantize(QuantizedKV(codes, scales), torch.float64) - x.double()).abs()
    assert (error <= scales.double()[..., None] * 0.5001).all()
    assert (codes.abs().amax(-1)[scales > 0] == 127).all()
    assert not codes[0, 0].any() and not scales[0, 0].any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    x = made(2, 3, 8)
    x[1, 2, 5] = value
    kv = quantize(x)
    back = dequantize(kv, torch.float32)
    assert not kv.codes[1, 2].any() and not back[1, 2].isfinite().any()
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
        found = kv_append(q, k, v, cos, sin, *coded, lengths, interleaved=interleaved)
    assert torch.equal(found, plain)
    for exact, kv in zip((k_cache, v_cache), coded, strict=True):
        for b, length in enumerate(lengths.tolist()):
            new = slice(length - q.shape[1], length)
            assert torch.equal(kv.codes[b, new], quantize(exact[b, new]).codes)
            assert torch.equal(kv.scales[b, new], quantize(exact[b, new]).scales)
            assert not kv.scales[b, length:].any() and not kv.scales[b, : new.start].any()


@pytest.mark.parametrize("backend", [*BACKENDS, ON_TRITON, ON_CUDA])
def test_appending_keeps_a_bad_head_to_itself(backend):
    args = list(append_arguments())
    args[1][1, 2, 1, 3] = math.nan
    args[2][0, 0, 0, 0] = math.inf
    args[5:7] = coded = [quantize(cache) for cache in args[5:7]]
    with on(backend):
        kv_append(*args)
    k, v = (dequantize(kv, torch.float32) for kv in coded)
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
            kv.codes[1, 41:], kv.scales[1, 41:] = 127, math.nan
            kv.codes[2, 1:], kv.scales[2, 1:] = -127, math.inf
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
        kv.codes[1, 3, 1], kv.scales[1, 3, 1] = 0, math.nan
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
    args = (q, *k, *quantize(v), True, None, None)
    op = OPS["attention_quantized"]
    with on(backend):
        assert_accurate((op(*args),), of_op(op, args), f"small values, T {T}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_beyond_the_cache_is_refused(backend):
    q, k, v = inputs(2, 1, 9, 4, 2, 64)
    with (
        use_backend(backend, strict=True),
        pytest.raises(ShapeError, match=r"lengths\[1\] is 10 and k has S = 9"),
    ):
        attention(q, k, v, lengths=torch.tensor([9, 10]))


def changed(kv: QuantizedKV, **parts) -> QuantizedKV:
    return kv._replace(**parts)


Q, K, V = inputs(2, 3, 9, 4, 2, 64, torch.float32)
BAD = {
    "values that are floats": (Q, K, made(2, 9, 2, 64), "one of keys and values is a QuantizedKV"),
    "keys that are floats": (Q, made(2, 9, 2, 64), V, "one of keys and values is a QuantizedKV"),
    "codes' dtype": (
        Q, changed(K, codes=K.codes.short()), V, "k's codes are torch.int16; they must be torch.in"
    ),
    "scales' dtype": (
        Q, K, changed(V, scales=V.scales.half()), "v's scales are torch.float16; they must be torch"
    ),
    "scales' shape": (
        Q, changed(K, scales=K.scales[:, :8]), V, r"k's scales has shape \(2, 8, 2\).*\(B, S, K\)"
    ),
    "fewer values": (Q, K, rows_of(V, slice(1)), r"v's codes has shape \(1, 9, 2, 64\)"),
    "heads": (Q[:, :, :3], K, V, "q has H = 3 heads of D = 64 and k has K = 2"),
    "devices": (Q, changed(K, scales=K.scales.to("meta")), V, "k's scales are on meta and q on c"),
    "whole numbers": (Q.long(), K, V, "q is torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    *args, says = BAD[name]
    with pytest.raises(ShapeError, match=says):
        attention(*args)


def test_a_cache_of_which_a_half_is_coded_is_refused():
    args = list(append_arguments())
    args[5] = quantize(args[5])
    with pytest.raises(ShapeError, match="kv_append: one of keys and values is a QuantizedKV"):
        kv_append(*args)
    args[6] = quantize(args[6][:, :7])
    with pytest.raises(ShapeError, match=r"v_cache's codes has shape \(2, 7, 2, 16\)"):
        kv_append(*args)


def test_a_gradient_is_refused():
    q = Q.clone().requires_grad_()
    with pytest.raises(GradientError, match=r"in 8 bits.*torch\.no_grad\(\)"):
        attention(q, K, V)
    with torch.no_grad():
        attention(q, K, V)
    k = made(2, 3, 2, 16).requires_grad_()
    args = list(append_arguments())
    args[5:7] = [quantize(cache) for cache in args[5:7]]
    with pytest.raises(GradientError, match="kv_append_quantized has no gradient, but k requires"):
        kv_append(args[0], k, *args[2:])


def test_a_backend_says_what_it_cannot_serve():
    assert explain("attention_quantized", Q, *K, *V).chosen == ("cpu" if cpu.isas() else "eager")
    odd = inputs(2, 3, 9, 4, 2, 12, torch.float32)
    apart = QuantizedKV(torch.empty(2, 9, 2, 128, dtype=torch.int8)[..., ::2], K.scales)
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
    assert torch.equal(kv_append(q, k, v, cos, sin, *coded, lengths), expected)
