"""Captured decode steps that a model keeps from one generation to the next, on the CPU with the
recorder of test_decode.py in the place of CUDA graphs."""

from __future__ import annotations

import gc
import importlib
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import llama_fast
from llama_fast.backends import cuda
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import use_backend
from llama_fast.generation import buckets
from llama_fast.generation.buckets import borrow_step, bucket, filled, forget_steps
from llama_fast.model import Llama

from .test_decode import RecordedGraphs

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=50,
    max_seq_len=600,
)  # fmt: skip
PROMPTS = [[1, 2, 3, 4], [7, 8], [9, 10, 11]]


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG, device="cpu").eval()


class Graphs(list):
    """Makes the recorders and keeps them."""

    def __call__(self, cache):
        self.append(RecordedGraphs(cache))
        return self[-1]

    def counts(self) -> list[tuple[int, int, int]]:
        """Of each recorder: its rows, and how often it has warmed up and captured."""
        return [(graphs.cache.batch, graphs.warm_ups, graphs.captures) for graphs in self]


def decode(model, prompts, steps, graphs, slots=40, restart=None):
    """Tokens (steps + 1, rows), greedily."""
    padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * p + prompt for p, prompt in zip(padding, prompts, strict=True)])
    with borrow_step(model, len(prompts), slots, capture=graphs) as step:
        with filled(step, padding) as cache:
            logits = model(ids, cache=cache, last_only=True)[:, -1]
        found = []
        for i in range(steps):
            assert logits.shape == (len(prompts), 50) and logits.isfinite().all()
            found.append(logits.argmax(-1))
            logits = step(found[-1])
            if i == restart:
                step.cache.restart(0)
        assert step.cache._lengths == step.cache.lengths.tolist()
    return torch.stack([*found, logits.argmax(-1)])


def poisoned(model):
    """Makes NaN of what a cache holds at first: what no row has written is never read."""
    make = model.new_cache

    def new_cache(*args):
        cache = make(*args)
        for x in cache.tensors():
            x.fill_(float("nan"))
        return cache

    model.new_cache = new_cache
    return model


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 9, 16, 17, 40)] == [1, 2, 4, 4, 8, 16, 16, 32, 48]


@pytest.mark.parametrize("restart", [None, 3])
def test_three_rows_replay_the_step_of_four(model, restart):
    graphs = Graphs()
    poisoned(model)
    expected = decode(model, PROMPTS, 12, lambda cache: None, restart=restart)
    forget_steps(model)
    for _ in range(3):
        assert torch.equal(decode(model, PROMPTS, 12, graphs, restart=restart), expected)
    assert graphs.counts() == [(4, 1, 1)]


def test_batches_of_other_sizes_share_the_cache(model):
    alone = {n: decode(model, PROMPTS[:n], 8, lambda cache: None) for n in (1, 2, 3)}
    forget_steps(model)
    graphs = Graphs()
    for n in (3, 1, 2, 3, 1):
        assert torch.equal(decode(model, PROMPTS[:n], 8, graphs), alone[n])
    assert graphs.counts() == [(4, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert len({graphs[i].cache.tensors()[0].data_ptr() for i in range(3)}) == 1


def test_what_a_replay_would_miss_makes_new_steps(model, monkeypatch):
    graphs = Graphs()

    def made(**options) -> int:
        before = len(graphs)
        decode(model, PROMPTS[:1], 3, graphs, **options)
        return len(graphs) - before

    assert made() == 1 and made(slots=200) == 0
    assert made(slots=300) == 1 and made() == 0  # longer texts; then there is room to spare
    model.set_weight("layers.0.mlp.down.weight", model.layers[0].mlp.down.weight.detach().clone())
    assert made() == 1
    with use_backend("eager"):
        assert made() == 1
    assert made() == 1
    monkeypatch.setattr(cuda, "OVERLAP", True)
    assert made() == 1 and made() == 0
    monkeypatch.setattr(cuda, "WARPGROUPS", True)
    assert made() == 1 and made() == 0
    hook = model.layers[0].register_forward_hook(lambda *args: None)
    assert made() == 1
    hook.remove()
    assert made() == 1
    with borrow_step(model, 1, 40, graphs, "int8") as step:
        assert step.cache.dtype is torch.int8
    assert made() == 1


def test_a_second_generation_at_the_same_time_has_its_own(model):
    graphs = Graphs()
    with borrow_step(model, 1, 40, graphs) as first, borrow_step(model, 1, 40, graphs) as second:
        assert first.cache.tensors()[0].data_ptr() != second.cache.tensors()[0].data_ptr()
    with borrow_step(model, 1, 40, graphs) as again:
        assert again in (first, second)


def test_an_exception_leaves_nothing_behind(model):
    with pytest.raises(KeyError), borrow_step(model, 1, 40, Graphs()):
        raise KeyError
    assert model not in buckets._kept


def test_kept_steps_do_not_keep_the_model(model):
    decode(model, PROMPTS, 3, Graphs())
    alone = Llama(CONFIG, device="cpu").eval()
    decode(alone, PROMPTS, 3, Graphs())
    gone = weakref.ref(alone)
    del alone
    gc.collect()
    assert gone() is None and model in buckets._kept


def test_generate_replays_a_bucket(model, monkeypatch):
    module = importlib.import_module("llama_fast.generation.generate")
    tokenizer = SimpleNamespace(bos_id=0, stop_ids=())
    monkeypatch.setattr(module, "_Text", Silent)
    monkeypatch.setattr(module, "StreamDecoder", lambda tokenizer, **options: None)
    plain = llama_fast.generate(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    graphs = Graphs()
    monkeypatch.setattr(module, "borrow_step", partial(borrow_step, capture=graphs))
    for _ in range(2):
        found = llama_fast.generate(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
        assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert graphs.counts() == [(4, 1, 1)]
    stream = llama_fast.stream(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    next(stream)
    stream.close()  # whoever reads has had enough: the steps are kept
    assert model in buckets._kept


class Silent:
    """Shows nothing: what a row's text is made of is not this file's matter."""

    def __init__(self, *args) -> None:
        self.stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this needs a GPU")
def test_cuda_graphs_of_a_bucket_give_the_same_tokens(model):
    on_gpu = Llama(CONFIG, device="cuda", dtype=torch.bfloat16).eval()
    on_gpu.load_state_dict(model.state_dict())
    prompts = [torch.tensor(p, device="cuda").tolist() for p in PROMPTS]

    def tokens(captured: bool):
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * p + x for p, x in zip(padding, prompts, strict=True)]).cuda()
        with borrow_step(on_gpu, 3, 40) as step:
            if not captured:
                step.capturer = None
            with filled(step, padding) as cache:
                found = [on_gpu(ids, cache=cache, last_only=True)[:, -1].argmax(-1)]
            for _ in range(20):
                found.append(step(found[-1]).argmax(-1))
        return torch.stack(found)

    expected = tokens(False)
    forget_steps(on_gpu)
    assert torch.equal(tokens(True), expected) and torch.equal(tokens(True), expected)
