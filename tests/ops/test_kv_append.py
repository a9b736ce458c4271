"""What kv_append refuses, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from llama_fast import kv_append, use_backend
from llama_fast.backends import cpu
from llama_fast.errors import GradientError, ShapeError
from llama_fast.ops.rope import tables

BACKENDS = ["eager", "cpu"] if cpu.isas() else ["eager"]
B, T, S, H, K, D = 2, 3, 8, 4, 2, 16


def arguments(lengths=(5, 4), *, S=S, P=S):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, H, D, generator=g)
    k, v = (torch.randn(B, T, K, D, generator=g) for _ in "kv")
    caches = [torch.randn(B, S, K, D, generator=g) for _ in "kv"]
    cos, sin = tables(g, P, D // 2, device="cpu")
    return q, k, v, cos, sin, *caches, torch.tensor(lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "S", "P"), [((5, 9), 8, 16), ((9, 5), 16, 8), ((2**40, 5), 8, 8)]
)
def test_a_row_beyond_the_cache_or_the_tables_is_refused_before_anything_is_written(
    backend, lengths, S, P
):
    args = arguments(lengths, S=S, P=P)
    caches = [cache.clone() for cache in args[5:7]]
    row, longest = max(enumerate(lengths), key=lambda item: item[1])
    with (
        use_backend(backend, strict=True),
        pytest.raises(ShapeError, match=rf"lengths\[{row}\] is {longest}.*S = {S}.*P = {P}"),
    ):
        kv_append(*args)
    assert all(torch.equal(a, b) for a, b in zip(caches, args[5:7], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_stored_and_its_queries_are_zero(backend):
    args = arguments((1, -4))
    k_before = args[5].clone()
    with use_backend(backend, strict=True):
        q = kv_append(*args)
    assert not q[0, :2].any() and q[0, 2].all() and not q[1].any()
    assert torch.equal(args[5][0, 1:], k_before[0, 1:]) and torch.equal(args[5][1], k_before[1])
    assert torch.equal(args[6][0, 0], args[2][0, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_at_a_time_gives_what_all_at_once_gives(backend):
    q, k, v, cos, sin, *caches, _ = arguments()
    single = [cache.clone() for cache in caches]
    with use_backend(backend, strict=True):
        at_once = kv_append(q, k, v, cos, sin, *caches, torch.tensor([T, T + 2]))
        for t in range(T):
            step = slice(t, t + 1)
            lengths = torch.tensor([t + 1, t + 3])
            one = kv_append(q[:, step], k[:, step], v[:, step], cos, sin, *single, lengths)
            assert torch.equal(one, at_once[:, step])
    assert all(torch.equal(a, b) for a, b in zip(single, caches, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("through", ["function", "torch.ops"])
def test_a_gradient_is_refused(which, through):
    args = list(arguments())
    args[which].requires_grad_()
    call = kv_append if through == "function" else torch.ops.llama_fast.kv_append
    with pytest.raises(GradientError, match=r"torch\.no_grad\(\), or use rope"):
        call(*args)
    with torch.no_grad():
        assert not call(*args).requires_grad


def test_autograd_knows_that_the_cache_has_changed():
    q, k, v, cos, sin, k_cache, v_cache, lengths = arguments()
    weight = torch.ones(D, requires_grad=True)
    loss = (k_cache * weight).sum()
    with torch.no_grad():
        kv_append(q, k, v, cos, sin, k_cache, v_cache, lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode(mode):
    """In the mode, and outside of it with tensors that were made there, which have no version."""
    with torch.inference_mode():
        args = arguments()
    before = args[5].clone()
    with mode():
        kv_append(*args)
    assert not torch.equal(before, args[5])
