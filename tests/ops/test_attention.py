"""What a result of attention depends on, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast import attention, use_backend
from llama_fast.backends import cpu

from .backends import BACKENDS, device, name_of, on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(B, T, S, H, K, D, dtype):
    made = torch.Generator().manual_seed(0)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("T", [1, 3, 21])
def test_a_row_depends_on_its_own_keys_alone(isa, dtype, T):
    """Neither on the rows beside it, of one part of the keys or of several, or of many queries, nor
    on what lies behind its length, nor on the number of threads."""
    S, lengths = 2200, [1, 2113, 3, 0, 1040, 2200]
    q, k, v = inputs(len(lengths), T, S, 8, 2, 64, dtype)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = math.nan
    before = torch.get_num_threads()
    try:
        with cpu.use_isa(isa), use_backend("cpu", strict=True):
            torch.set_num_threads(1)
            together = attention(q, k, v, lengths=torch.tensor(lengths))
            assert together.isfinite().all()
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                found = attention(q, k, v, lengths=torch.tensor(lengths))
                assert torch.equal(found, together), f"{threads} threads"
            for b, length in enumerate(lengths):
                one, queries = slice(b, b + 1), min(T, length)
                alone = attention(q[one, T - queries :], k[one, :length], v[one, :length])
                assert torch.equal(together[one, T - queries :], alone), length
                assert not together[b, : T - queries].any()
    finally:
        torch.set_num_threads(before)


def one_number(scores: torch.Tensor, D: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q (1, 1, 1, D) and k (1, S, 1, D) whose products are these scores (S,), without a sum."""
    q, k = torch.zeros(1, 1, 1, D, dtype=dtype), torch.zeros(1, len(scores), 1, D, dtype=dtype)
    q[..., 0], k[0, :, 0, 0] = 1, scores.to(dtype)
    return q, k


def softmax_of(k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """What a query of one_number should have, (D,) in float64."""
    scale = torch.tensor(scale).double()  # a float32, as in every backend
    weights = (k[0, :, 0, 0].double() * scale).softmax(0)
    return weights @ v[0, :, 0].double()


# Scores and a scale. Each softmax is finite; in float32 the product of its largest score and
# scale · log2 e is off by up to 2^100, or infinite.
LARGE = {
    "equal": (torch.full((150,), -3.0), 1.3e8),
    "equal and positive": (torch.full((150,), 3.0), 1e37),
    "far apart": (torch.arange(150) % 11 - 5.0, 6e37),
    "one of them": (torch.arange(150) * -1.0, 7e9),
    "the last": (torch.arange(150) - 150.0, 7e9),
    "near each other": (2.0**16 - 2.0**9 * (torch.arange(150) % 7), 2.0**-9),
    "products near the largest float": (3.3e38 * torch.linspace(-1, 1, 150), 1e-37),
    "scores near the largest float": (3.3e38 * torch.linspace(-1, 1, 150), 1.0),
    "no scale": (torch.arange(150) * 1.0, 0.0),
    "keys of no weight first": (torch.arange(150).where(torch.arange(150) > 99, -math.inf), 0.1),
    "negative": (torch.arange(150) % 11 - 5.0, -6e37),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_scores_of_any_finite_size(backend, dtype, name):
    """Decoded, and as the last of many queries, which see nothing of it."""
    scores, scale = LARGE[name]
    q, k = one_number(scores, 64, dtype)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if k[scores.isfinite().view(1, -1, 1)].isinf().any():
        pytest.skip(f"{dtype} has no such number")
    if "eager" in backend and dtype != torch.float32:
        pytest.skip("its scores are rounded to a half type, which has no such numbers")
    if "cuda" in backend and dtype == torch.float32:
        pytest.skip("it serves the half types")
    if "triton" in backend and scale <= 0:
        pytest.skip("it serves positive scales")
    expected = softmax_of(k, v, scale)
    bound = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    to = device(backend)
    with on(backend):
        for T in (1, 40):
            queries = q.expand(1, T, 1, 64).contiguous().to(to)
            o = attention(queries, k.to(to), v.to(to), scale=scale)
            assert (o[0, -1, 0].cpu().double() - expected).abs().max() <= bound, T


@pytest.mark.parametrize("backend", [b for b in BACKENDS if name_of(b) in ("eager", "triton")])
@pytest.mark.parametrize("dtype", DTYPES[:2])  # float16 does not hold them
def test_gradients_of_large_scores_are_finite(backend, dtype):
    q, k, v = inputs(1, 40, 40, 2, 1, 64, dtype)
    to = device(backend)
    q, k, v = (x.to(to).requires_grad_() for x in (q.abs(), -torch.ones_like(k), v))
    with on(backend):
        o = attention(q, k, v, scale=1e8)
        for grad in torch.autograd.grad(o.float().square().sum(), (q, k, v)):
            assert grad.isfinite().all()
