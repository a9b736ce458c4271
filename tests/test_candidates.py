"""Draws of a model over ranks: of candidates, with the tokens that all logits give."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.config.share import Share
from llama_fast.errors import PromptError
from llama_fast.generation.candidates import Drawer, candidates_of, exchanged_bytes
from llama_fast.generation.grammar import allowed_by
from llama_fast.generation.sampling import Sampling

V, B = 5000, 3
CONFIG = LlamaConfig(
    dim=64, n_layers=1, n_heads=8, n_kv_heads=8, head_dim=8, hidden_dim=1280, vocab_size=V,
    max_seq_len=64,
)  # fmt: skip
KNOWN = V - 7
BEYOND = V + 7  # a tokenizer may have more ids than the model


class Threads:
    """Ranks that are threads, and count the bytes that they give."""

    def __init__(self, size: int) -> None:
        self.size, self.given, self.parts = size, [0] * size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def of(self, rank: int) -> SimpleNamespace:
        def gather(x: torch.Tensor) -> torch.Tensor:
            self.given[rank] += x.nbytes
            self.parts[rank] = x
            self.barrier.wait()
            whole = torch.cat(self.parts, -1)
            self.barrier.wait()
            return whole

        return SimpleNamespace(gather=gather)

    def drawer(self, rank: int, dtype: torch.dtype, known: int = KNOWN) -> Drawer:
        share = Share(CONFIG, rank, self.size)
        head = SimpleNamespace(share=share, ranks=self.of(rank), leader=None)
        return Drawer(SimpleNamespace(head=head, dtype=dtype), known)

    def draw(self, logits, allowed, sampling, dtype=torch.float32, known=KNOWN):
        """What each rank draws of its part of the logits."""

        def of_rank(rank):
            drawer = self.drawer(rank, dtype, known)
            own = logits[:, slice(*drawer.part.share.ranges["V"])]
            return drawer.draw(own, allowed, [sampling] * B, generators())

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(of_rank, range(self.size)))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(B)]


def drawn_alone(logits, allowed, sampling, known=KNOWN):
    drawer = Drawer(SimpleNamespace(head=None, dtype=torch.float32), known)
    return drawer.draw(logits, allowed, [sampling] * B, generators())


SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "top_p": Sampling(),
    "top_k": Sampling(temperature=1.3, top_p=1, top_k=40),
    "top_k and top_p": Sampling(temperature=2, top_p=0.8, top_k=300),
    "cold": Sampling(temperature=1e-30),
}


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("kind", ["sharp", "equal ones", "equal at the top", "grammar"])
def test_the_tokens_of_one_process(size, name, kind):
    g = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(B, V, generator=g)
    logits[:, KNOWN:] = 90  # never drawn
    allowed = [None] * B
    if kind == "equal ones":  # at the top, in several ranks, and of either sign
        logits = (logits / 2).round() * 0.5
        logits[0, [4990, 17, 2600]] = 7.0
        logits[1] = torch.where(logits[1] > 0, -0.0, logits[1])
        logits[1, ::2] += 0.0
    if kind == "equal at the top":  # so candidates suffice
        logits[:, [4990, 17, 2600]] = 19.125
    if kind == "grammar":  # what one row may be lies in one rank
        allowed[1] = np.zeros(KNOWN, dtype=bool)
        allowed[1][1200:1230] = True
    before = logits.clone()
    sampling = SAMPLINGS[name]
    tokens, scores, _ = drawn_alone(logits, allowed, sampling)
    ranks = Threads(size)
    found = ranks.draw(logits, allowed, sampling)
    for of_rank in found:
        assert torch.equal(of_rank[0], tokens)
        torch.testing.assert_close(of_rank[1], scores, rtol=1e-6, atol=2e-6)
        assert torch.equal(of_rank[1], found[0][1])
    assert torch.equal(logits, before)
    if kind != "equal ones" or name not in ("top_p", "cold"):  # where more are kept
        n = candidates_of(sampling)
        each = exchanged_bytes(n, Share(CONFIG, 0, size).rows_each, torch.float32)
        assert ranks.given == [B * each] * size
        if each < Share(CONFIG, 0, size).rows_each * 4:
            assert each == (n + 2) * 8


def test_where_candidates_are_too_few_the_logits_are_gathered():
    flat = torch.randn(B, V, generator=torch.Generator().manual_seed(2)) / 10
    for sampling, tried in (Sampling(), B * 258 * 8), (Sampling(1.0, 1.0), 0):
        ranks = Threads(2)
        rows = Share(CONFIG, 0, 2).rows_each
        tokens, scores, _ = drawn_alone(flat, [None] * B, sampling)
        for of_rank in ranks.draw(flat, [None] * B, sampling):
            assert torch.equal(of_rank[0], tokens) and torch.equal(of_rank[1], scores)
        assert ranks.given == [tried + B * rows * 4] * 2


def test_logits_of_half_a_type_are_gathered_as_such():
    flat = (torch.randn(B, V, generator=torch.Generator().manual_seed(2)) / 10).bfloat16().float()
    ranks = Threads(4)
    tokens = drawn_alone(flat, [None] * B, Sampling(1.0, 1.0)).tokens
    found = ranks.draw(flat, [None] * B, Sampling(1.0, 1.0), torch.bfloat16)
    assert torch.equal(found[3][0], tokens)
    assert ranks.given == [B * Share(CONFIG, 0, 4).rows_each * 2] * 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 1.0), Sampling(0)])
def test_a_tokenizer_with_more_ids_than_the_model(sampling):
    """What fills up the last rank's rows is no token."""
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(5)) / 10 - 5
    tokens, scores, _ = drawn_alone(logits, [None] * B, sampling, BEYOND)
    for found in Threads(2).draw(logits, [None] * B, sampling, known=BEYOND):
        assert torch.equal(found[0], tokens)
        torch.testing.assert_close(found[1], scores, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_cannot_be_drawn_has_no_logprob(name, bad):
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(3))
    if bad == -math.inf:
        logits[1] = bad
    else:
        logits[1, 3333] = bad
    for _, scores, _ in Threads(2).draw(logits, [None] * B, SAMPLINGS[name]):
        assert not scores[1].isfinite() and scores[[0, 2]].isfinite().all()


def test_a_vocabulary_whose_last_rank_has_no_known_token():
    """All that it has is padding."""
    ranks = Threads(8)
    config = dataclasses.replace(CONFIG, vocab_size=640, vocab_padding=90)

    def of_rank(rank):
        share = Share(config, rank, 8)
        head = SimpleNamespace(share=share, ranks=ranks.of(rank), leader=None)
        drawer = Drawer(SimpleNamespace(head=head, dtype=torch.float32), 550)
        own = logits[:, slice(*share.ranges["V"])]
        return drawer.draw(own, [None] * B, [Sampling(temperature=0)] * B, generators())[0]

    logits = torch.randn(B, 640, generator=torch.Generator().manual_seed(4))
    with ThreadPoolExecutor(8) as pool:
        for tokens in pool.map(of_rank, range(8)):
            assert torch.equal(tokens, logits[:, :550].argmax(-1))


MIXED = [Sampling(0), Sampling(1.3, 1, 40), Sampling()]


@pytest.mark.parametrize(
    ("rows", "what", "exchanged"),
    [
        (None, "sharp", ["candidates"]),
        ([4, 0, 2], "sharp", ["candidates"]),
        ([4, 0, 2], "flat", ["candidates", "whole"]),
        ([4, 0, 2], "grammar", ["whole"]),
    ],
)
def test_where_one_rank_leads_the_others_give_what_they_are_told_to(rows, what, exchanged):
    """A server's rows: each has settings of its own, and some are not drawn."""
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(6))
    logits = logits / 10 if what == "flat" else 4 * logits
    logits = logits[:B] if rows is None else logits
    allowed = [None] * B
    if what == "grammar":
        allowed[2] = np.arange(KNOWN) % 7 == 3
    given = {"rows": rows, "top": 5}
    alone = Drawer(SimpleNamespace(head=None, dtype=torch.float32), KNOWN)
    expected = alone.draw(logits, allowed, MIXED, generators(), **given)
    ranks, told = Threads(3), []
    queues = [queue.SimpleQueue() for _ in range(2)]

    def say(*call):
        told.append(call[0])
        for each in queues:
            each.put(call)

    def follow(rank):
        while (call := queues[rank - 1].get(timeout=20))[0] != "end":
            name, known, *args = call
            part = ranks.drawer(rank, torch.float32, known).part
            getattr(part, name)(logits[:, slice(*part.share.ranges["V"])], *args)

    with ThreadPoolExecutor(2) as pool:
        followers = [pool.submit(follow, rank) for rank in (1, 2)]
        leads = ranks.drawer(0, torch.float32)
        leads.part.head.leader = SimpleNamespace(say=say)
        own = logits[:, slice(*leads.part.share.ranges["V"])]
        try:
            drawn = leads.draw(own, allowed, MIXED, generators(), **given)
        finally:
            say("end")
        for follower in followers:
            follower.result()
    assert told == [*exchanged, "end"]
    assert torch.equal(drawn.tokens, expected.tokens) and torch.equal(drawn.top[0], expected.top[0])
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(drawn.top[1], expected.top[1], rtol=1e-6, atol=2e-6)


def test_a_grammar_without_a_token_is_an_error():
    nothing = SimpleNamespace(allowed=lambda: np.zeros(KNOWN, dtype=bool))
    with pytest.raises(PromptError, match="allows no token"):
        allowed_by(nothing)
    assert allowed_by(None) is None
