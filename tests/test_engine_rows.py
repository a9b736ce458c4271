"""Rows of an engine that texts come to and leave: set aside and taken up again, and steps of the
first rows alone. Every row must be as if it were alone."""

from __future__ import annotations

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.dispatch import use_backend
from llama_fast.errors import PromptError, ShapeError
from llama_fast.generation.engine import Engine
from llama_fast.generation.sampling import Sampling, sample_each
from llama_fast.model import Llama

from .test_captured_step import RecordedGraphs

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=50,
    max_seq_len=64,
)  # fmt: skip
PROMPTS = [[1, 2, 3, 4], [7, 8], [9, 10, 11], [5, 6, 5, 6, 5]]
# As floats computed in another order, on backends and for other numbers of rows.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG, device="cpu").eval()


def alone(model, prompt, steps, kv_cache=None):
    """Logits (steps + 1, V) of a greedy text in an engine of its own, and its tokens."""
    with Engine.acquire(model, 1, 64, kv_cache) as engine:
        found = [engine.prefill([prompt])[0].clone()]
        for _ in range(steps):
            found.append(engine.step(found[-1].argmax().view(1))[0].clone())
    return torch.stack(found), [int(one.argmax()) for one in found]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("capture", [None, RecordedGraphs])
@pytest.mark.parametrize("inference", [False, True])
def test_a_row_that_is_held_stays_as_it_is(model, backend, kv_cache, capture, inference):
    """Row 1 is set aside, nearly full, for more steps of the others than it has room for."""
    long = [1 + n % 40 for n in range(60)]
    with use_backend(backend), torch.inference_mode(inference):
        expected, tokens = alone(model, long, 4, kv_cache)
        with Engine.acquire(model, 3, 64, kv_cache, capture=capture) as engine:
            first = engine.prefill([PROMPTS[0], long, PROMPTS[2]])
            torch.testing.assert_close(first[1], expected[0], **CLOSE)
            before = engine.cache.held(1)
            engine.hold(1)
            engine.hold(1)  # once more changes nothing
            assert engine.lengths == [4, 60, 3]
            poison(engine, 1, 60)
            for _ in range(20):
                assert engine.step(torch.tensor([3, 4, 5]))[[0, 2]].isfinite().all()
            assert engine.lengths == [24, 60, 23]
            assert all(
                x[1, :, 60:].isnan().all() for x in engine.cache.tensors() if x.is_floating_point()
            )
            engine.resume(1, 60)
            assert all(torch.equal(x, before[name]) for name, x in engine.cache.held(1).items())
            for n, token in enumerate(tokens[:4]):
                logits = engine.step(torch.tensor([0, token, 0]))[1]
                torch.testing.assert_close(logits, expected[n + 1], **CLOSE)


def poison(engine, row, start):
    """What lies behind a row's tokens is NaN, or a scale of NaN."""
    for x in engine.cache.tensors():
        if x.is_floating_point():
            x[row, :, start:] = torch.nan


def test_a_row_goes_on_from_a_beginning(model):
    expected, tokens = alone(model, [*PROMPTS[0][:2], 8, 9], 5)
    with Engine.acquire(model, 2, 64) as engine:
        engine.prefill([PROMPTS[0]])
        engine.hold(0)
        engine.prefill([[1, 1]], 1)
        engine.resume(0, 2)
        assert engine.lengths == [2, 2]
        torch.testing.assert_close(engine.prefill([[8, 9]])[0], expected[0], **CLOSE)
        for n, token in enumerate(tokens[:5]):
            logits = engine.step(torch.tensor([token, 0]))[0]
            torch.testing.assert_close(logits, expected[n + 1], **CLOSE)


def test_a_prompt_may_come_in_parts_between_steps(model):
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    expected, _ = alone(model, text, 0)
    with Engine.acquire(model, 2, 64) as engine:
        engine.prefill([PROMPTS[1]])
        engine.hold(1)
        for start in range(0, 9, 3):
            engine.resume(1, start)
            logits = engine.prefill([text[start : start + 3]], 1)
            engine.hold(1)
            engine.step(torch.tensor([1, 2]))
            engine.step_first(torch.tensor([1]))
        torch.testing.assert_close(logits[0], expected[0], **CLOSE)
        assert engine.lengths == [8, 9]


@pytest.mark.parametrize("capture", [None, RecordedGraphs])
def test_the_first_rows_alone(model, capture):
    """Steps of 1, 2, 3 and 4 rows in turn; each row goes on as if it were alone."""
    known = [alone(model, prompt, 12) for prompt in PROMPTS]
    with Engine.acquire(model, 4, 64, capture=capture) as engine:
        engine.prefill(PROMPTS)
        done = [0] * 4
        for n in (4, 1, 2, 2, 3, 1, 4, 3, 2, 4, 1):
            tokens = torch.tensor([known[row][1][done[row]] for row in range(n)])
            logits = engine.step_first(tokens)
            assert logits.shape == (n, 50)
            for row in range(n):
                done[row] += 1
                torch.testing.assert_close(logits[row], known[row][0][done[row]], **CLOSE)
            assert engine.lengths == [len(p) + d for p, d in zip(PROMPTS, done, strict=True)]


def test_what_cannot_be_is_refused(model):
    engine = Engine(model, model.new_cache(2, 8))
    engine.prefill(PROMPTS[:2])
    engine.hold(1)
    with pytest.raises(PromptError, match="held"):
        engine.prefill([[1]], 1)
    with pytest.raises(ShapeError, match="holds 2"):
        engine.resume(1, 3)
    with pytest.raises(ShapeError, match="not held"):
        engine.resume(0, 1)
    for _ in range(4):
        engine.step_first(torch.tensor([1]))
    before = engine.lengths
    with pytest.raises(PromptError, match="Make it larger"):
        engine.step_first(torch.tensor([1]))
    assert engine.lengths == before == [8, 2]
    with pytest.raises(ShapeError):
        engine.step_first(torch.tensor([], dtype=torch.int64))
    engine.truncate([3, 1])
    assert engine.lengths == [3, 1]
    engine.resume(1, 1)
    engine.hold(0)
    engine.free(0)
    assert engine.lengths == [0, 1]
    engine.hold(0)
    engine.reset()
    assert engine.lengths == [0, 0]
    assert engine.prefill(PROMPTS[:2]).isfinite().all()


def test_each_row_is_drawn_as_its_own_settings_say():
    torch.manual_seed(1)
    logits = torch.randn(7, 300, device="cpu") * 3
    given = logits.clone()
    plain, greedy, hot = Sampling(), Sampling(0), Sampling(2.0, 1.0, 40)
    settings = [plain, greedy, hot, plain, hot, greedy, Sampling(1.0, 0.5)]

    def generators():
        return [torch.Generator().manual_seed(row) for row in range(7)]

    for _ in range(5):
        found = sample_each(logits, settings, generators())
        for row, sampling in enumerate(settings):
            one = sampling.sample(logits[row : row + 1], [generators()[row]])
            assert one.dtype is found.dtype and one[0] == found[row]
        logits = logits.roll(1, -1)
    assert torch.equal(logits.roll(-5, -1), given)
    same = sample_each(logits, [plain] * 7, generators())
    assert torch.equal(same, plain.sample(logits, generators()))
