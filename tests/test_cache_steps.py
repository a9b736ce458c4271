"""A model's steps with a KV cache: compiled in any way they are what they are eagerly, and one that
raises leaves the cache as it was."""

from __future__ import annotations

import shutil

import pytest
import torch

from llama_fast.dispatch import wrapped_launches
from llama_fast.errors import PromptError, ShapeError
from llama_fast.model import Llama

from .checkpoints import SMALL

KINDS = [None, "int8"]
TOKENS = torch.randint(1, 320, (2, 14), generator=torch.Generator().manual_seed(0))
CHUNKS = (5, 1, 1, 3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(SMALL, dtype=torch.float32).eval()


def logits(model, cache, chunks=CHUNKS):
    start, found = 0, []
    for T in chunks:
        found.append(model(TOKENS[:, start : start + T], cache=cache))
        start += T
    return found


def compiled(model, how: str):
    torch._dynamo.reset()
    if how == "torch.compile":
        return torch.compile(model, dynamic=True)
    for module in [model] if how == "model.compile" else model.layers:
        module.compile(dynamic=True)
    return model


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *((how, None) for how in ("model.compile", "torch.compile", "layers")),
        ("model.compile", "int8"),
    ],
)
def test_compiled_by_inductor(model, how, kind):
    """Whose graphs lose the second of two writes into slices of one tensor."""
    expected = logits(model, model.new_cache(2, 32, kind))
    found = logits(compiled(model, how), model.new_cache(2, 32, kind))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def interrupted(op: str, after: int, error: type[BaseException]):
    """Inside the block, call number `after` of an op raises instead."""
    count = 0

    def wrapper(its_op, backend, launch):
        def call(*args):
            nonlocal count
            count += its_op.name == op
            if its_op.name == op and count > after:
                raise error
            return launch(*args)

        return call

    return wrapped_launches(wrapper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["kv_append", "rms_norm", "add_rms_norm", "linear"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_raises_leaves_the_cache_as_it_was(model, kind, op, error):
    expected = logits(model, model.new_cache(2, 32, kind))[-1]
    cache = model.new_cache(2, 32, kind)
    logits(model, cache, CHUNKS[:-1])
    after = {"linear": 6, "rms_norm": 0}.get(op, 1)  # the head, the first norm, the second layer
    with pytest.raises(error), interrupted(op, after, error):
        model(TOKENS[:, 7:10], cache=cache)
    assert cache.used == 7 and cache.lengths.tolist() == [7, 7]
    assert torch.equal(model(TOKENS[:, 7:10], cache=cache), expected)


def test_arguments_that_are_refused_leave_the_cache_as_it_was(model):
    expected = logits(model, model.new_cache(2, 12))[-1]
    cache = model.new_cache(2, 12)
    logits(model, cache, CHUNKS[:-1])
    for bad, error in [
        (torch.full((2, 3), 320), IndexError),
        (TOKENS[:1, :3], ShapeError),
        (TOKENS[:, :3].int(), ShapeError),
        (TOKENS[:, :6], PromptError),
    ]:
        with pytest.raises(error):
            model(bad, cache=cache)
        with pytest.raises(error):
            model.hidden(bad, cache=cache)
    assert torch.equal(model(TOKENS[:, 7:10], cache=cache), expected)


def test_a_part_of_a_cache_counts_for_the_whole(model):
    cache = model.new_cache(3, 32)
    memory = cache.lengths
    part = cache.first(2)
    model(TOKENS[:, :5], cache=part)
    cache.take_lengths(part)
    assert cache.lengths is memory and memory.tolist() == [5, 5, 0] and cache.used == 5


def test_logits_with_a_cache_record_no_gradient(model):
    assert not model(TOKENS, cache=model.new_cache(2, 32)).requires_grad
