"""The CUDA kernels of a cache in 8 bits, on the host: how keys are split, extremes of scales,
prompts in parts; and that a step with them can be captured."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast import kv_append
from llama_fast.backends import cuda
from llama_fast.dispatch import use_backend
from llama_fast.ops.attention import OP
from llama_fast.ops.kv_append import OP as APPEND
from llama_fast.ops.quantized_kv import quantize

from ..cuda_host import host
from .oracle import assert_accurate, of_op, run_poisoned

pytestmark = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")

bf16, f16 = torch.bfloat16, torch.float16


def arguments(B, T, S, H, K, D, lengths=None, causal=True, dtype=bf16, scale=None):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, H, D, generator=g).to(dtype)
    k, v = (quantize(torch.randn(B, S, K, D, generator=g)) for _ in "kv")
    lengths = None if lengths is None else torch.tensor(lengths)
    return q, *k, *v, causal, scale, lengths


def in_order(q, k, k_scale, v, v_scale, causal, scale, lengths) -> tuple:
    """As the op takes them."""
    return q, k, v, causal, scale, lengths, False, k_scale, v_scale


def in_cache(x: torch.Tensor) -> torch.Tensor:
    """x (B,S,K,…) with the values it has, in memory of (B,K,S + 5,…)."""
    room = torch.zeros(x.shape[0], x.shape[2], x.shape[1] + 5, *x.shape[3:], dtype=x.dtype)
    return room.transpose(1, 2)[:, : x.shape[1]].copy_(x)


def append(q, k, v, cos, sin, caches, lengths, **options) -> torch.Tensor:
    (k_cache, k_scale), (v_cache, v_scale) = caches
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths, **scales, **options)


def launches_of(args, order=0):
    """Runs the op as the oracle wants it; the blocks of each launch."""
    args = in_order(*args)
    with host.use_host(order=order), use_backend("cuda", strict=True):
        host.take_launches()
        actual = run_poisoned(OP, args)
        launches = host.take_launches()
    assert_accurate(actual, of_op(OP, args), "attention in 8 bits")
    return [(launch.kernel, launch.blocks) for launch in launches]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((1, 1, 700, 4, 1, 128), {}, 6),  # as many keys as the last split needs, and fewer
        ((1, 1, 700, 8, 2, 64), {}, 6),
        ((3, 1, 501, 4, 1, 64), {"lengths": [501, 3, 0]}, 6),  # splits without keys
        ((1, 4, 400, 4, 1, 128), {"lengths": [391]}, 4),  # later queries see more
        ((1, 2, 300, 16, 2, 64), {"causal": False}, 6),
        ((1, 1, 128, 1, 1, 64), {}, 1),
    ],
)
def test_keys_are_split(shape, options, blocks, dtype, order):
    args = arguments(*shape, **options, dtype=dtype)
    assert launches_of(args, order) == [("attention_decode_quantized", blocks)]


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("G", [1, 3, 7, 16])
def test_groups_lengths_and_strides(G, D, dtype):
    K = 2
    lengths = [0, 1, 2, 31, 33, 97]
    q, *parts, causal, scale, at = arguments(6, 1, 97, G * K, K, D, lengths, dtype=dtype)
    parts = [in_cache(x) for x in parts]
    for row, length in enumerate(lengths):  # what lies behind a length is never used
        for codes in parts[::2]:
            codes[row, length:] = 127
        for scales in parts[1::2]:
            scales[row, length:] = float("nan")
    (kernel,) = launches_of((q, *parts, causal, scale, at), order=1)
    assert kernel[0] == "attention_decode_quantized"


SCALES = {
    "small": (1e-3, 1e-3),
    "large": (40.0, 400.0),
    "tiny values": (1.0, 1e-6),
    "subnormal values of float16": (1.0, 3e-8),
    "values below the bound of scales": (1.0, 1e-28),
    "large values": (1.0, 1e3),
}


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("name", SCALES)
def test_sizes_of_keys_and_values(name, dtype):
    q, k, k_scales, v, v_scales, *rest = arguments(1, 2, 333, 6, 2, 64, scale=0.05, dtype=dtype)
    of_k, of_v = SCALES[name]
    launches_of((q, k, k_scales * of_k, v, v_scales * of_v, *rest))


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_values_of_very_different_sizes(dtype):
    """A key of no weight with a value a million times the others', heads of zeros, and one token
    that is most of the sum beside many with little."""
    q, k, k_scales, v, v_scales, *rest = arguments(2, 1, 600, 4, 2, 128, dtype=dtype)
    k_scales = k_scales * 0.05
    k[0, 3] = (-100 * q[0, 0, ::2].sign()).to(torch.int8)
    k_scales[0, 3] = 5.0
    v_scales = v_scales * 1e-2
    v_scales[0, 3] *= 1e4 if dtype is f16 else 1e6
    v[0, 40:80] = v_scales[0, 40:80] = 0
    k[1, 0] = (100 * q[1, 0, ::2].sign()).to(torch.int8)
    k_scales[1, 0] = 1.3e-2
    v_scales[:, :, 1] = 0
    v[:, :, 1] = 0
    launches_of((q, k, k_scales, v, v_scales, *rest))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_queries_of_any_size_in_bfloat16(size):
    """They go through float16 with a step of their own for each row."""
    q, *parts, causal, _, lengths = arguments(1, 3, 100, 4, 1, 64)
    q = (q.float() * size).to(bf16)
    q[0, 1] = 0
    parts[1] = parts[1] * 1e-3
    launches_of((q, *parts, causal, 1 / size, lengths))


@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("T", [1, 9])
def test_a_scale_that_is_not_finite_reaches_its_head_alone(T, value, which):
    args = list(arguments(2, T, 300, 4, 2, 64))
    args[1 + which] = args[1 + which].clone()
    args[1 + which][1, 290, 1] = value
    args[which][1, 290, 1] = 0
    with host.use_host(), use_backend("cuda", strict=True):
        o, _ = OP(*in_order(*args))
    assert o[0].isfinite().all() and o[1, :, :2].isfinite().all()
    assert not o[1, -1, 2:].isfinite().any()


def test_counts_are_left_at_zero_for_the_next_call():
    args = arguments(1, 1, 700, 4, 1, 64)
    for _ in range(3):
        launches_of(args)
    counts = cuda._arrived((0, 0, False), 1, torch.device("cpu"))
    assert not counts.any()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 17, 17, 1, 1, 64), {}),
        ((3, 65, 150, 4, 2, 128), {"lengths": [150, 20, 0]}),
        ((2, 20, 70, 2, 2, 64), {"dtype": f16, "causal": False}),
        ((1, 40, 9, 1, 1, 128), {}),  # the first queries see nothing
    ],
)
def test_many_queries(shape, options, order):
    widened, attended = launches_of(arguments(*shape, **options), order)
    assert widened[0] == "dequantize_cache" and attended[0] == "attention_prefill"


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_many_queries_take_some_rows_at_a_time(rows, monkeypatch):
    q, *parts, causal, scale, lengths = arguments(5, 20, 40, 4, 2, 64, [40, 0, 25, 7, 33])
    parts = [in_cache(x) for x in parts]
    monkeypatch.setattr(cuda, "WIDE_BYTES", rows * 2 * 40 * 2 * 64 * 2 + 1)
    launches = launches_of((q, *parts, causal, scale, lengths))
    kernels = [kernel for kernel, _ in launches]
    assert kernels == ["dequantize_cache", "attention_prefill"] * -(-5 // min(rows, 5))


def test_many_queries_go_to_warpgroups_where_these_are_asked_for(monkeypatch):
    monkeypatch.setattr(cuda, "WARPGROUPS", True)
    q, *parts, causal, scale, lengths = arguments(2, 40, 300, 4, 2, 128, [300, 131])
    for scales in parts[1::2]:
        scales[1, 131:] = float("nan")
    kernels = [kernel for kernel, _ in launches_of((q, *parts, causal, scale, lengths))]
    assert kernels == ["dequantize_cache", "attention_prefill_wgmma"]


def test_what_is_not_served_is_said():
    q, k, k_scales, v, v_scales, *rest = arguments(1, 1, 9, 2, 1, 64)
    apart = torch.zeros(1, 9, 1, 72, dtype=torch.int8)[..., :64]  # 72 bytes from head to head

    def reasons(*args):
        with host.use_host(), use_backend("cuda"):
            return OP.explain(*in_order(*args)).reasons["cuda"]

    assert reasons(q, k, k_scales, v, v_scales, *rest) == []
    assert "multiples of 16 bytes" in reasons(q, apart, k_scales, v, v_scales, *rest)[0]
    assert "bfloat16 or float16" in reasons(q.float(), k, k_scales, v, v_scales, *rest)[0]
    assert "64 or 128" in reasons(*arguments(1, 1, 9, 2, 1, 72))[0]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [bf16, f16, torch.float32])
@pytest.mark.parametrize("D", [2, 22, 64, 80, 128, 256, 600])
@pytest.mark.parametrize("interleaved", [False, True])
def test_codes_are_those_of_what_a_plain_cache_holds(interleaved, D, dtype, order):
    """Bit for bit: the same rotation comes before both."""
    g = torch.Generator().manual_seed(D)
    B, T, S, H, K = 3, 4, 9, 5, 3
    qkv = torch.randn(B, T, H + 2 * K, D, generator=g).to(dtype)
    q, k, v = qkv.split((H, K, K), dim=2)
    k[0, 3] *= 1e-6
    k[1, 2, 0], v[1, 3, 1] = 0, 0
    angles = torch.rand(S, D // 2, generator=g) * 6
    lengths = torch.tensor([4, 9, 2])  # the last row has two tokens of padding
    plain = [torch.zeros(B, K, S, D, dtype=dtype).transpose(1, 2) for _ in "kv"]
    coded = [quantize(cache) for cache in plain]
    tables = angles.cos(), angles.sin()
    with host.use_host(order=order), use_backend("cuda", strict=True):
        expected = kv_append(q, k, v, *tables, *plain, lengths, interleaved=interleaved)
        found = append(q, k, v, *tables, coded, lengths, interleaved=interleaved)
    assert torch.equal(found, expected)
    for cache, (codes, scales) in zip(plain, coded, strict=True):
        for row, length in enumerate(lengths.tolist()):
            new = slice(max(0, length - T), length)
            expected_codes, expected_scales = quantize(cache[row, new])
            assert torch.equal(codes[row, new], expected_codes)
            assert torch.equal(scales[row, new], expected_scales)
            assert not codes[row, length:].any() and not codes[row, : new.start].any()
            assert not scales[row, length:].any() and not scales[row, : new.start].any()


def test_subnormal_and_bad_heads_are_coded_as_the_definition_does():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 64, generator=g) for _ in "qkv")
    v[0, 0, 0], v[0, 0, 0, 7] = 1e-43, 2e-43  # a scale of one bit: codes beyond 127 are cut
    v[0, 0, 1] = 1e-45  # a scale of 0
    v[0, 0, 2, 5] = float("inf")
    v[0, 0, 3, 9] = float("nan")
    tables = torch.ones(3, 32), torch.zeros(3, 32)
    caches = [quantize(torch.zeros(1, 3, 4, 64)) for _ in "kv"]
    with host.use_host(), use_backend("cuda", strict=True):
        append(q, k, v, *tables, caches, torch.tensor([2]))
    codes, scales = (part[0, 1] for part in caches[1])
    expected_codes, expected_scales = quantize(v[0, 0])
    assert torch.equal(codes, expected_codes) and codes[0].abs().max() == 127
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)


class NoHostReads(TorchDispatchMode):
    """What a stream that is captured refuses: to wait for a value, or to make a shape of values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "_to_copy")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cuda", "eager"])
def test_a_step_can_be_captured(backend):
    """Launchers ask for no value, where the definition does."""
    given = arguments(2, 1, 700, 8, 2, 64, [700, 3])
    _, k8, k_scale, v8, v_scale, *_, lengths = given
    attended = in_order(*given)
    q, k, v = (torch.zeros(2, 1, heads, 64, dtype=bf16) for heads in (8, 2, 2))
    angles = torch.zeros(700, 32)
    appended = (q, k, v, angles, angles, k8, v8, lengths, False, k_scale, v_scale)
    with host.use_host(), use_backend(backend, strict=True):
        for op, args in ((OP, attended), (APPEND, appended)):
            op._specialize(
                (), args
            )  # it is served before, so that nothing is looked up in the capture
            if backend == "cuda":
                with NoHostReads():
                    op.run(*args)
            else:
                with NoHostReads(), pytest.raises(RuntimeError, match="when stream is capturing"):
                    op.run(*args)
