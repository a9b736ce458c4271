"""How the CUDA kernels split keys over blocks, on the host: the ops' cases have few splits."""

from __future__ import annotations

import pytest
import torch

from llama_fast.backends import cuda
from llama_fast.dispatch import use_backend
from llama_fast.errors import FallbackWarning
from llama_fast.ops.attention import OP

from ..cuda_host import host
from .oracle import assert_accurate, of_op, run_poisoned

pytestmark = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")


def arguments(B, T, S, H, K, D, lengths=None, causal=True, dtype=torch.bfloat16, need_lse=True):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, H, D, generator=g).to(dtype)
    k, v = (torch.randn(B, S, K, D, generator=g).to(dtype) for _ in "kv")
    lengths = None if lengths is None else torch.tensor(lengths)
    return q, k, v, causal, None, lengths, need_lse


def launches_of(args, order=0):
    """Runs the op as the oracle wants it; the blocks of each launch."""
    with host.use_host(order=order), use_backend("cuda", strict=True):
        host.take_launches()
        actual = run_poisoned(OP, args)
        launches = host.take_launches()
    assert_accurate(actual, of_op(OP, args), "attention")
    return [(launch.kernel, launch.blocks) for launch in launches]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((1, 1, 700, 4, 1, 128), {}, 6),  # as many keys as the last split needs, and fewer
        ((1, 1, 700, 8, 2, 64), {}, 6),
        ((3, 1, 500, 4, 1, 64), {"lengths": [500, 3, 0]}, 6),  # splits without keys
        ((1, 4, 400, 4, 1, 128), {"lengths": [390]}, 4),  # later queries see more
        ((1, 2, 300, 16, 2, 64), {"causal": False}, 6),
        ((1, 1, 128, 1, 1, 64), {}, 1),
    ],
)
def test_keys_are_split(shape, options, blocks, dtype, order):
    args = arguments(*shape, **options, dtype=dtype)
    assert launches_of(args, order) == [("attention_decode", blocks)]


def test_counts_are_left_at_zero_for_the_next_call():
    args = arguments(1, 1, 700, 4, 1, 64)
    for _ in range(3):
        launches_of(args)
    counts = cuda._arrived((0, 0, False), 1, torch.device("cpu"))
    assert not counts.any()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((1, 17, 17, 1, 1, 64), {}, 1),  # one block of 64 rows
        ((2, 65, 150, 4, 2, 128), {"lengths": [150, 20]}, 8),
        ((1, 130, 130, 2, 2, 64), {}, 4),
        ((1, 200, 70, 1, 1, 128), {}, 2),  # the first queries see nothing
    ],
)
def test_many_queries(shape, options, blocks, order):
    assert launches_of(arguments(*shape, **options), order) == [("attention_prefill", blocks)]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((1, 17, 17, 1, 1, 64), {}, 1),  # one tile, most of its rows and keys not there
        ((1, 300, 300, 1, 1, 128), {}, 3),  # causal: blocks of 2, 2 and 3 tiles
        ((1, 70, 400, 3, 1, 64), {}, 2),  # later queries, groups of 3; the second consumer idle
        ((2, 40, 550, 8, 2, 128), {"lengths": [550, 131]}, 8),  # the last values are wiped
        ((3, 30, 290, 1, 1, 64), {"lengths": [256, 0, -3], "causal": False}, 3),
        ((1, 130, 60, 1, 1, 64), {"dtype": torch.float16}, 2),  # the first queries see nothing
        ((1, 65, 257, 2, 2, 128), {"dtype": torch.float16, "causal": False}, 2),
    ],
)
def test_warpgroups(shape, options, blocks, order, monkeypatch):
    monkeypatch.setattr(cuda, "WARPGROUPS", True)
    q, k, v, *rest = arguments(*shape, **options)
    if rest[2] is not None:  # what lies behind a row's length is never used
        for row, length in enumerate(rest[2]):
            k[row, max(0, length) :] = v[row, max(0, length) :] = float("nan")
    assert launches_of((q, k, v, *rest), order) == [("attention_prefill_wgmma", blocks)]


@pytest.mark.parametrize("stride", ["heads first", "fused", "one head"])
def test_warpgroups_take_strides(stride, monkeypatch):
    monkeypatch.setattr(cuda, "WARPGROUPS", True)
    q, k, v, *rest = arguments(2, 33, 140, 2, 1 if stride == "one head" else 2, 64)
    if stride == "heads first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif stride == "fused":
        k, v = torch.cat([k, v], -1).split(64, -1)
    blocks = 2 if stride == "one head" else 4
    assert launches_of((q, k, v, *rest)) == [("attention_prefill_wgmma", blocks)]


@pytest.mark.parametrize("why", ["scale", "stride", "not asked for"])
def test_what_warpgroups_cannot_do_goes_to_the_other_kernel(why, monkeypatch):
    monkeypatch.setattr(cuda, "WARPGROUPS", why != "not asked for")
    q, k, v, causal, scale, *rest = arguments(2, 20, 20, 1, 1, 64)
    if why == "scale":
        scale = -0.1
    if why == "stride":
        v = v[:1].expand(2, -1, -1, -1)
    args = q, k, v, causal, scale, *rest
    with host.use_host(), use_backend("cuda", strict=True):
        host.take_launches()
        o, _ = OP(*args)
        assert [launch.kernel for launch in host.take_launches()] == ["attention_prefill"]
    torch.testing.assert_close(o, OP.eager(*args)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", OP.cases(), ids=str)
def test_the_ops_cases_with_warpgroups(case, monkeypatch):
    """Those of D 64 and 128; of few queries the other kernel is right."""
    monkeypatch.setattr(cuda, "WARPGROUPS", True)
    for dtype in {torch.bfloat16, torch.float16} & set(case.dtypes):
        args = case.make(torch.Generator().manual_seed(0), dtype, "cpu")
        q, k = args[:2]
        if q.shape[-1] not in (64, 128):
            continue
        packed = args[-1] is not None  # which the other kernel serves
        many = (
            not packed and q.numel() and k.numel() and q.shape[1] * (q.shape[2] // k.shape[2]) > 16
        )
        kernels = [kernel for kernel, _ in launches_of(args, order=1)]
        assert ("attention_prefill_wgmma" in kernels) == bool(many)


@pytest.mark.parametrize(
    ("B", "K", "S", "multiprocessors", "expected"),
    [
        (1, 8, 8192, 132, 33),  # 8B, one sequence: 264 blocks are one wave
        (1, 8, 300, 132, 3),
        (64, 8, 8192, 132, 1),
        (1, 8, 1, 132, 1),
        (0, 8, 10, 132, 1),
    ],
)
def test_how_many_splits(B, K, S, multiprocessors, expected):
    assert host.module().kv_splits(B, K, S, multiprocessors) == expected


def test_heads_that_are_not_aligned_are_left_to_others():
    q, k, v, *rest = arguments(1, 1, 9, 2, 1, 64)
    wide = torch.zeros(1, 9, 1, 68, dtype=k.dtype)
    with host.use_host(), use_backend("cuda"), pytest.warns(FallbackWarning, match="16 bytes"):
        OP(q, wide[..., 2:66], v, *rest)


def test_a_view_that_begins_between_is_served_after_an_aligned_one():
    """What the registry remembers of the first call must not lead the second astray."""
    q, k, v, *rest = arguments(1, 1, 9, 2, 1, 64)
    room = torch.empty(k.numel() + 1, dtype=k.dtype)
    odd = room[1:].view(k.shape).copy_(k)
    assert odd.data_ptr() % 16 and odd.stride() == k.stride()
    with host.use_host(), use_backend("cuda", strict=True):
        expected = OP(q, k, v, *rest)[0]
        assert torch.equal(OP(q, odd, v, *rest)[0], expected)
