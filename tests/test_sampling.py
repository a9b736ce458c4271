"""Sampling against the rule written out, and against what it must mean statistically."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llama_fast.errors import PromptError, TokenizerError
from llama_fast.generation.folder_sampling import folder_sampling
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
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "0.5"}, "temperature is '0.5'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": 1j}, "temperature"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"temperature": -1e-300}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": "all"}, "top_p"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be 0 .off. or more, and whole"),
        ({"top_k": "3"}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(PromptError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    "of",
    [float, np.float32, np.float64, torch.tensor, np.array],
    ids=["float", "float32", "float64", "tensor", "array"],
)
def test_numbers_of_other_kinds_are_numbers(of):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))

    def draw(sampling):
        return sampling.sample(logits, [torch.Generator().manual_seed(i) for i in range(2)])

    whole = np.int64(7) if of is not torch.tensor else torch.tensor(7)
    found = Sampling(of(0.5), of(0.75), whole)
    assert (type(found.temperature), type(found.top_p), type(found.top_k)) == (float, float, int)
    assert torch.equal(draw(found), draw(Sampling(0.5, 0.75, 7)))


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-38, 1e-39, 1e-45, 1e-46, 5e-324])
@pytest.mark.parametrize("size", [1.0, 60.0, 1e8])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 3)])
def test_the_limit_of_small_temperatures_is_greedy(temperature, size, top_p, top_k):
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * size
    logits[:, 7] = -math.inf
    sampling = Sampling(temperature, top_p, top_k)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    assert torch.equal(sampling.sample(logits, generators), logits.argmax(-1))
    p, ids = sampling.probabilities(logits)
    assert torch.equal(ids[:, 0], logits.argmax(-1)) and p[:, 0].tolist() == [1] * 4


@pytest.mark.parametrize("temperature", [1e10, 1e38, 1e39, 1e300])
def test_the_limit_of_large_temperatures_is_uniform(temperature):
    logits = torch.tensor([[5.0, -math.inf, -3.0, 0.0]])
    p, ids = Sampling(temperature, 1.0).probabilities(logits)
    assert p[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0]) and ids[0, 3] == 1


def test_more_tokens_than_there_are_may_be_kept():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    expected, _ = Sampling(1.0, 1.0).probabilities(logits)
    for top_k in (9, 10, 2**40, 2**70):
        assert torch.allclose(Sampling(1.0, 1.0, top_k).probabilities(logits)[0], expected)


# --- what a folder recommends -----------------------------------------------------------------


def test_a_folders_own_sampling(tmp_path):
    file = tmp_path / "generation_config.json"
    assert folder_sampling(tmp_path) == Sampling()
    file.write_text('{"temperature": 0.3, "top_p": 0.5, "top_k": 7, "do_sample": true}')
    assert folder_sampling(tmp_path) == Sampling(0.3, 0.5, 7)
    assert folder_sampling(tmp_path, temperature=0.0, top_k=0) == Sampling(0.0, 0.5, 0)
    file.write_text('{"temperature": 0.3, "do_sample": false, "top_p": null}')
    assert folder_sampling(tmp_path) == Sampling(0.0, 0.9, 0)
    file.write_text('{"top_p": 3}')
    with pytest.raises(PromptError, match=r"generation_config.json: top_p is 3"):
        folder_sampling(tmp_path)
    file.write_text("{")
    with pytest.raises(TokenizerError, match=r"generation_config.json"):
        folder_sampling(tmp_path)
