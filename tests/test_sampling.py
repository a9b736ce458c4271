"""Sampling against the rule written out, and against what it must mean statistically."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast.errors import PromptError
from llama_fast.generation.sampling import Sampling, logprobs


def by_hand(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """The kept tokens and their probabilities, in plain Python."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    p = {i: weights[i] / sum(weights) for i in order}
    if top_k:
        p = {i: p[i] for i in order[:top_k]}
    kept, before, whole = {}, 0.0, sum(p.values())
    for i in p:
        if before > top_p * whole:
            break
        kept[i] = p[i]
        before += p[i]
    return {i: q / sum(kept.values()) for i, q in kept.items()}


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_probabilities_are_the_rule(temperature, top_p, top_k):
    logits = torch.randn(4, 13, generator=torch.Generator().manual_seed(2))
    p, ids = Sampling(temperature, top_p, top_k).probabilities(logits)
    for row in range(4):
        expected = by_hand(logits[row].tolist(), temperature, top_p, top_k)
        found = {i: q for i, q in zip(ids[row].tolist(), p[row].tolist(), strict=True) if q > 0}
        assert found.keys() == expected.keys()
        for i, q in found.items():
            assert q == pytest.approx(expected[i], rel=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.3, 0), (1.0, 40), (0.8, 7), (0.9999, 0)])
@pytest.mark.parametrize("spread", [0.1, 3.0, 6.0])
def test_sorting_a_part_changes_nothing(monkeypatch, top_p, top_k, spread):
    """Rounded to eighths, many logits are equal, also where the kept ones end."""
    logits = torch.randn(3, 4000, generator=torch.Generator().manual_seed(3)) * spread
    logits = (logits * 8).round() / 8
    sampling = Sampling(0.7, top_p, top_k)

    def result():
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return *sampling.probabilities(logits), sampling.sample(logits, generators)

    p, ids, drawn = result()
    monkeypatch.setattr(Sampling, "_lowest", lambda *args: None)
    whole_p, whole_ids, whole_drawn = result()
    assert whole_p.shape[1] == 4000
    if top_k or (top_p <= 0.9 and spread > 1):
        assert p.shape[1] < 200
    n = p.shape[1]
    assert torch.equal(p, whole_p[:, :n]) and whole_p[:, n:].count_nonzero() == 0
    kept = p > 0
    assert torch.equal(ids[kept], whole_ids[:, :n][kept])
    assert torch.equal(drawn, whole_drawn)


def test_the_crossing_token_stays():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    p, _ = Sampling(1.0, top_p=0.6).probabilities(logits)
    assert p[0].tolist() == pytest.approx([0.625, 0.375, 0.0])


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(4000, 4).contiguous()
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = Sampling(1.0, 1.0).sample(logits, generators).bincount(minlength=4) / 4000
    assert (drawn - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.03


def test_temperature_zero_is_argmax():
    logits = torch.randn(5, 50)
    assert torch.equal(Sampling(0).sample(logits, []), logits.argmax(-1))


def test_a_row_draws_from_its_own_generator():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def draw(rows):
        generators = [torch.Generator().manual_seed(10 + i) for i in rows]
        return Sampling(2.0, 1.0).sample(logits[rows], generators).tolist()

    assert draw([0, 1, 2]) == draw([0]) + draw([1]) + draw([2])


def test_logprobs_are_untempered():
    logits = torch.randn(3, 7)
    tokens = torch.tensor([1, 0, 6])
    expected = logits.softmax(-1).log()[torch.arange(3), tokens]
    torch.testing.assert_close(logprobs(logits, tokens), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(PromptError, match=message):
        Sampling(**values)
