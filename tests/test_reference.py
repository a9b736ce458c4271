"""The reference of a large call, made in parts, is that of the whole."""

from __future__ import annotations

import pytest
import torch

from llama_fast.bench import oracle as reference
from llama_fast.bench.shapes import Work, problem_shapes
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS

TINY = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)


@pytest.fixture
def in_parts(monkeypatch):
    """Lets the reference of a call be made as if memory were short: of a row or two at a time."""

    def make(op, args, which):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "EXACT_BYTES", 2e5)
            patch.setattr(reference, "COPIES", 200)
            patch.setattr(reference, "_scores", lambda args: 10**9)
            blocks = [len(list(reference._blocks(5, 10)))]
            assert blocks == [1] and len(list(reference._blocks(5, 100))) > 1
            return reference.reference(op, args, which)

    return make


@pytest.mark.parametrize(
    "work",
    [Work("training", 2, 5, 5), Work("prefill", 2, 5, 9), Work("decode", 3, 1, 9)],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_heads_and_queries(work, causal, in_parts):
    op = OPS["attention"]
    args = problem_shapes("attention", TINY, work)["attention"](0)
    args = (*args[:3], causal, *args[4:])
    passes = (reference.FORWARD, reference.BACKWARD)
    for which in passes if work.name == "training" else passes[:1]:
        whole = reference.reference(op, args, which)
        parts = in_parts(op, args, which)
        assert [x.shape for x in parts] == [x.shape for x in whole]
        assert reference.distance(parts, whole) < 1e-6  # float32, which scarce memory asks for


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_cross_entropy_by_rows(reduction, in_parts):
    op = OPS["linear_cross_entropy"]
    x, weight, targets, *_ = problem_shapes(op.name, TINY, Work.training(7))[op.name](0)
    targets[2] = -100
    for need in (True, False):
        args = (x, weight, targets, -100, need, need, reduction)
        which = reference.BOTH if need else reference.FORWARD
        whole = op.eager(*(a.double() if a is x or a is weight else a for a in args))
        parts = in_parts(op, args, which)
        assert len(parts) == (3 if need else 1)
        for part, expected in zip(parts, whole, strict=False):
            torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-7)
