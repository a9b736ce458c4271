"""Positions up to 131,071 and as many keys, the context of Llama 3.1, on every backend."""

from __future__ import annotations

import importlib
import math
from functools import cache

import pytest
import torch

from llama_fast.config import RopeScaling
from llama_fast.nn.rope import rope_tables
from llama_fast.ops.attention import OP as ATTENTION
from llama_fast.ops.kv_append import OP as KV_APPEND
from llama_fast.ops.quantized_kv import quantize
from llama_fast.ops.rope import OP as ROPE

from . import oracle
from .backends import BACKENDS, PRODUCTS, device, name_of, on

S = 131072
SCALINGS = {"3": None, "3.1": RopeScaling(8.0), "3.2": RopeScaling(32.0)}
# CUDA's kernels take half types of 64 or 128 alone.
OF_MANY_KEYS = [backend for backend in PRODUCTS if not name_of(backend).startswith("cuda")]
OF_CUDA = [backend for backend in PRODUCTS if name_of(backend).startswith("cuda")]


@cache
def tables(D: int, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(D, S, scaling=SCALINGS[scaling])


def angle(position: int, i: int, D: int, scaling: RopeScaling | None) -> float:
    """As Meta's published code reckons, from wavelengths, in Python's own floats."""
    frequency = 500000.0 ** (-2 * i / D)
    if scaling is not None:
        wavelength = 2 * math.pi / frequency
        L, low, high = 8192, scaling.low_freq_factor, scaling.high_freq_factor
        if wavelength > L / low:
            frequency /= scaling.factor
        elif wavelength > L / high:
            smooth = (L / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    return position * frequency


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("D", [64, 128])
def test_tables_at_far_positions(D, scaling):
    cos, sin = tables(D, scaling)
    assert len(cos) == len(sin) == S
    # An angle of 131,071 radians is known to 2⁻³⁶ in float64, which is nothing beside float32.
    for position in (8191, 8192, 32767, 65535, 65536, 100_003, S - 2, S - 1):
        for i in range(D // 2):
            exact = angle(position, i, D, SCALINGS[scaling])
            assert abs(cos[position, i].item() - math.cos(exact)) < 2**-24
            assert abs(sin[position, i].item() - math.sin(exact)) < 2**-24


def last_tokens(T: int, D: int, K: int, dtype: torch.dtype, where: str) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    heads = torch.randn(1, T, 4 * K, D, generator=g).to(dtype).to(where).split((2 * K, K, K), 2)
    return [x.contiguous() for x in heads]


def rotated(x: torch.Tensor, D: int, scaling: str) -> torch.Tensor:
    """x (1,T,heads,D), the last T tokens, in float64 from angles in float64."""
    T = x.shape[1]
    angles = torch.tensor(
        [[angle(p, i, D, SCALINGS[scaling]) for i in range(D // 2)] for p in range(S - T, S)],
        dtype=torch.float64,
    )[:, None]
    a, b = x.cpu().double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_at_the_last_positions(backend, scaling):
    """By the tables' last rows, as slices of them; the error is that of a float32 rotation."""
    D, T = 64, 3
    dtype = torch.bfloat16 if backend.startswith("cuda") else torch.float32
    q, k, _ = last_tokens(T, D, 2, dtype, device(backend))
    cos, sin = (table[-T:].to(q.device) for table in tables(D, scaling))
    with on(backend):
        found = ROPE(q, k, cos, sin, False)
    for x, y in zip((q, k), found, strict=True):
        exact = rotated(x, D, scaling)
        most = 4 * torch.finfo(dtype).eps * x.abs().max().item()
        assert (y.cpu().double() - exact).abs().max() < most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("int8", [False, True])
def test_kv_append_into_the_last_slots(backend, int8):
    D, T, K = 64, 3, 1
    where = device(backend)
    dtype = torch.bfloat16 if backend.startswith("cuda") else torch.float32
    q, k, v = last_tokens(T, D, K, dtype, where)
    cos, sin = (table.to(where) for table in tables(D, "3.1"))
    caches = [
        torch.full((1, K, S, D), 111, dtype=torch.int8 if int8 else dtype, device=where)
        for _ in "kv"
    ]
    scales = [torch.full((1, S, K), 7.0, device=where) for _ in "kv"] if int8 else [None, None]
    slots = [cache.transpose(1, 2) for cache in caches]
    lengths = torch.tensor([S], device=where)
    with on(backend):
        y = KV_APPEND(q, k, v, cos, sin, *slots, lengths, False, *scales)
    most = 4 * torch.finfo(dtype).eps * q.abs().max().item()
    assert (y.cpu().double() - rotated(q, D, "3.1")).abs().max() < most
    for x, exact, scale in zip(
        slots, (rotated(k, D, "3.1"), v.cpu().double()), scales, strict=True
    ):
        written = x[:, -T:].cpu().double()
        if scale is not None:
            written *= scale[:, -T:, :, None].cpu()
            assert (scale[:, :-T] == 7).all()
            most = exact.abs().max() / 127
        assert (written - exact).abs().max() < most
        assert (x[:, :-T] == 111).all()  # and nothing else was


@cache
def many_keys(
    T: int, dtype: torch.dtype, int8: bool, D: int = 32
) -> tuple[tuple, list[oracle.Expected]]:
    """Queries that look for few keys, so that their sums are not those of noise."""
    g = torch.Generator().manual_seed(T)
    q = 3 * torch.randn(1, T, 2, D, generator=g)
    k, v = (torch.randn(1, 1, S, D, generator=g) for _ in "kv")
    for key, of in ((7, 0), (S // 2, T // 2), (S - 1, T - 1)):
        k[0, 0, key] = q[0, of, 0] / 2
    k, v, scales = k.transpose(1, 2), v.transpose(1, 2), (None, None)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if int8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        scales = k_scale, v_scale
    args = (q, k, v, True, None, torch.tensor([S]), False, *scales, None)
    return args, oracle.of_op(ATTENTION, args)


@pytest.mark.parametrize("backend", OF_MANY_KEYS)
@pytest.mark.parametrize(
    ("T", "dtype", "int8"),
    [(1, torch.float32, False), (9, torch.bfloat16, False), (9, torch.float32, True)],
    ids=["decode", "prefill", "prefill int8"],
)
def test_attention_to_as_many_keys(backend, T, dtype, int8, monkeypatch):
    if backend == "triton":
        forward = pytest.importorskip("llama_fast.triton_kernels.attention.forward")
        configs = importlib.import_module("llama_fast.triton_kernels.attention.configs")
        # The interpreter takes as long for a small tile.
        wide = configs.AttentionConfig(16, 256, 4, 1)
        for name in ("forward_config", "int8_config"):
            monkeypatch.setattr(forward, name, lambda *_: wide)
    judge(backend, *many_keys(T, dtype, int8))


@pytest.mark.thorough
@pytest.mark.parametrize("backend", OF_CUDA)
@pytest.mark.parametrize(
    ("T", "int8"), [(1, False), (9, False), (1, True)], ids=["decode", "prefill", "decode int8"]
)
def test_attention_to_as_many_keys_in_cuda(backend, T, int8):
    judge(backend, *many_keys(T, torch.bfloat16, int8, 64))


def judge(backend: str, args: tuple, expected: list[oracle.Expected]) -> None:
    where = device(backend)
    args = tuple(x.to(where) if isinstance(x, torch.Tensor) else x for x in args)
    with on(backend):
        found = ATTENTION(*args)
    oracle.assert_accurate(found[:1], expected[:1], backend)
