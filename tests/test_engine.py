"""The engine: rows that are rolled back, end and begin; several tokens in a step; and the captured
steps that a model keeps from one engine to the next, on the CPU with the recorder of
test_captured_step.py in the place of CUDA graphs."""

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
from llama_fast.errors import PromptError, ShapeError
from llama_fast.generation import engine as kept
from llama_fast.generation.engine import Engine, captured_batch_size, forget_steps
from llama_fast.model import Llama

from .test_captured_step import RecordedGraphs, run_as_it_is

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
    with Engine.acquire(model, len(prompts), slots, capture=graphs) as engine:
        logits = engine.prefill(prompts)
        found = []
        for i in range(steps):
            assert logits.shape == (len(prompts), 50) and logits.isfinite().all()
            found.append(logits.argmax(-1))
            logits = engine.step(found[-1])
            if i == restart:
                engine.cache.restart(0)
        assert engine.cache._lengths == engine.cache.lengths.tolist()
    return torch.stack([*found, logits.argmax(-1)])


def empty(model, *args):
    """A cache that holds NaN at first: what no row has written is never read."""
    cache = Llama.new_cache(model, *args)
    for x in cache.tensors():
        x.fill_(float("nan") if x.is_floating_point() else 127)
    return cache


def poisoned(model):
    model.new_cache = partial(empty, model)
    return model


def test_captured_batch_sizes():
    sizes = [captured_batch_size(n) for n in (1, 2, 3, 4, 5, 9, 16, 17, 40)]
    assert sizes == [1, 2, 4, 4, 8, 16, 16, 32, 48]


@pytest.mark.parametrize("restart", [None, 3])
def test_three_rows_replay_the_step_of_four(model, restart):
    graphs = Graphs()
    poisoned(model)
    expected = decode(model, PROMPTS, 12, run_as_it_is, restart=restart)
    forget_steps(model)
    for _ in range(3):
        assert torch.equal(decode(model, PROMPTS, 12, graphs, restart=restart), expected)
    assert graphs.counts() == [(4, 1, 1)]


def test_batches_of_other_sizes_share_the_cache(model):
    alone = {n: decode(model, PROMPTS[:n], 8, run_as_it_is) for n in (1, 2, 3)}
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
    with Engine.acquire(model, 1, 40, "int8", capture=graphs) as engine:
        assert engine.cache.dtype is torch.int8
    assert made() == 1


def test_a_second_generation_at_the_same_time_has_its_own(model):
    acquire = partial(Engine.acquire, model, 1, 40, capture=Graphs())
    with acquire() as first, acquire() as second:
        assert first.cache.tensors()[0].data_ptr() != second.cache.tensors()[0].data_ptr()
    with acquire() as again:
        assert again.cache in (first.cache, second.cache)


def test_an_exception_leaves_nothing_behind(model):
    with pytest.raises(KeyError), Engine.acquire(model, 1, 40, capture=Graphs()):
        raise KeyError
    assert model not in kept._kept


def test_kept_steps_do_not_keep_the_model(model):
    decode(model, PROMPTS, 3, Graphs())
    alone = Llama(CONFIG, device="cpu").eval()
    decode(alone, PROMPTS, 3, Graphs())
    gone = weakref.ref(alone)
    del alone
    gc.collect()
    assert gone() is None and model in kept._kept


def test_generate_replays_a_captured_batch_size(model, monkeypatch):
    module = importlib.import_module("llama_fast.generation.generate")
    tokenizer = SimpleNamespace(bos_id=0, stop_ids=(), vocab_size=50, special_names={})
    monkeypatch.setattr(module, "_Text", Silent)
    monkeypatch.setattr(module, "StreamDecoder", lambda tokenizer, **options: None)
    plain = llama_fast.generate(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    graphs = Graphs()
    acquire = partial(Engine.acquire, capture=graphs)
    follow = importlib.import_module("llama_fast.generation.follow")
    monkeypatch.setattr(follow, "Engine", SimpleNamespace(acquire=acquire))
    for _ in range(2):
        found = llama_fast.generate(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
        assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert graphs.counts() == [(4, 1, 1)]
    stream = llama_fast.stream(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=0)
    next(stream)
    stream.close()  # whoever reads has had enough: the steps are kept
    assert model in kept._kept


class Silent:
    """Shows nothing: what a row's text is made of is not this file's matter."""

    def __init__(self, *args) -> None:
        self.stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this needs a GPU")
def test_cuda_graphs_of_a_captured_batch_size_give_the_same_tokens(model):
    on_gpu = Llama(CONFIG, device="cuda", dtype=torch.bfloat16).eval()
    on_gpu.load_state_dict(model.state_dict())

    def tokens(captured: bool):
        capture = None if captured else run_as_it_is
        with Engine.acquire(on_gpu, 3, 40, capture=capture) as engine:
            found = [engine.prefill(PROMPTS).argmax(-1)]
            for _ in range(20):
                found.append(engine.step(found[-1]).argmax(-1))
        return torch.stack(found)

    expected = tokens(False)
    forget_steps(on_gpu)
    assert torch.equal(tokens(True), expected) and torch.equal(tokens(True), expected)


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """After each of the tokens, (T,V), with no cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


NOTHING = torch.ones(3, 0, dtype=torch.int64)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CAPTURES = pytest.mark.parametrize("capture", [None, run_as_it_is, RecordedGraphs])


@CAPTURES
@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_step_of_several_tokens_gives_the_logits_of_each(model, T, capture):
    engine = Engine(model, empty(model, 3, 64), capture=capture)
    engine.prefill(PROMPTS)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(4):  # the third replays
        tokens = torch.randint(50, (3, T))
        found = engine.step(tokens).clone()
        for row, new in enumerate(tokens.tolist()):
            texts[row] += new
            torch.testing.assert_close(found[row], logits_of(model, texts[row])[-T:], **CLOSE)
        assert engine.lengths == [*map(len, texts)] == engine.cache.lengths.tolist()
    assert (engine.captured(T).replay is not None) is (capture is not run_as_it_is)


@CAPTURES
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_drafts_that_are_rolled_back_leave_no_trace(model, capture, kv_cache):
    """As in speculative decoding: drafts are verified, and what is wrong in them truncated."""

    def decode(draft: bool) -> torch.Tensor:
        engine = Engine(model, empty(model, 3, 40, kv_cache), capture=capture)
        tokens, found = engine.prefill(PROMPTS).argmax(-1), []
        for _ in range(12):
            if draft:
                before = engine.lengths
                engine.step(torch.randint(50, (3, 4)))
                engine.truncate([before[0] + 2, before[1], before[2] + 4])
                engine.truncate(before)
            logits = engine.step(tokens)
            found.append(logits.clone())
            tokens = logits.argmax(-1)
        assert engine.lengths == [len(prompt) + 12 for prompt in PROMPTS]
        return torch.stack(found)

    assert torch.equal(decode(True), decode(False))


@CAPTURES
def test_a_kept_draft_is_the_text(model, capture):
    engine = Engine(model, model.new_cache(2, 40), capture=capture)
    engine.prefill(PROMPTS[:2])
    for _ in range(3):
        engine.truncate([4, 2])
        engine.step(torch.tensor([[5, 6, 7], [8, 9, 10]]))
        engine.truncate([5, 4])
        found = engine.step(torch.tensor([11, 12]))
        for row, text in enumerate(([*PROMPTS[0], 5, 11], [*PROMPTS[1], 8, 9, 12])):
            torch.testing.assert_close(found[row], logits_of(model, text)[-1], **CLOSE)


@CAPTURES
def test_a_row_that_ended_is_given_another_prompt_while_the_others_go_on(model, capture):
    engine = Engine(model, empty(model, 3, 12), capture=capture)
    texts = [list(prompt) for prompt in PROMPTS]
    engine.prefill(PROMPTS)

    def step(*tokens: int) -> None:
        found = engine.step(torch.tensor(tokens))
        for row in {0, 1, 2} - ended:
            texts[row].append(tokens[row])
            torch.testing.assert_close(found[row], logits_of(model, texts[row])[-1], **CLOSE)

    ended: set[int] = set()
    for i in range(7):
        step(i, i + 1, i + 2)
    engine.free(0)
    ended.add(0)
    assert engine.lengths == [0, 9, 10]
    step(0, 1, 2)
    logits = engine.prefill([[20, 21, 22, 23, 24]], first_row=0)
    texts[0], ended = [20, 21, 22, 23, 24], set()
    torch.testing.assert_close(logits[0], logits_of(model, texts[0])[-1], **CLOSE)
    assert engine.lengths == [5, 10, 11]
    step(3, 4, 5)
    engine.free(1)
    engine.free(-1)
    logits = engine.prefill([[30], [31, 32, 33]], first_row=1)
    texts[1:] = [[30], [31, 32, 33]]
    for row in (1, 2):
        torch.testing.assert_close(logits[row - 1], logits_of(model, texts[row])[-1], **CLOSE)
    step(6, 7, 8)
    assert engine.lengths == [7, 2, 4] == engine.cache.lengths.tolist()


def test_rows_that_hold_nothing_take_no_room(model):
    """Of a captured batch size, and rows that ended: they are emptied before the cache is full."""
    with Engine.acquire(model, 3, 40, capture=Graphs()) as engine:
        engine.prefill(PROMPTS)
        engine.free(1)
        for _ in range(33):  # of 256 slots
            engine.step(torch.ones(3, 8, dtype=torch.int64))
            held = engine.cache.host_lengths
            engine.cache.truncate([4, held[1], 3, held[3]])
        assert engine.lengths == [4, 0, 3]
        engine.step(torch.ones(3, 200, dtype=torch.int64))
        assert engine.lengths == [204, 0, 203]


def test_prefill_goes_on_where_the_rows_are(model):
    """A second turn, of one length or of several; and a long prompt, a chunk at a time."""
    engine = Engine(model, empty(model, 3, 64))
    texts = [list(prompt) for prompt in PROMPTS]
    even, uneven = [[5, 6], [7, 8], [9, 10]], [[1], [2, 3, 4], [5, 6]]
    for turn in (PROMPTS, even, uneven, torch.ones(3, 4).long()):
        found = engine.prefill(turn)
        for row, new in enumerate(turn):
            if turn is not PROMPTS:
                texts[row] += [int(token) for token in new]
            torch.testing.assert_close(found[row], logits_of(model, texts[row])[-1], **CLOSE)
        assert engine.lengths == [*map(len, texts)] == engine.cache.lengths.tolist()


def test_a_long_prompt_is_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr(kept, "PREFILL_CHUNK", 16)
    long = torch.randint(50, (50,)).tolist()
    engine = Engine(model, empty(model, 2, 64))
    found = engine.prefill([long, long[:21]])
    torch.testing.assert_close(found[0], logits_of(model, long)[-1], **CLOSE)
    torch.testing.assert_close(found[1], logits_of(model, long[:21])[-1], **CLOSE)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_takes_a_prefill_back(model, monkeypatch, failing):
    """All chunks of it, of every row, whether they held anything or not."""
    monkeypatch.setattr(kept, "PREFILL_CHUNK", 4)
    engine = Engine(model, model.new_cache(3, 64))
    engine.prefill(PROMPTS)
    engine.free(2)
    engine.step(torch.tensor([5, 6, 7]))
    before, calls = engine.lengths, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) > failing:
            raise KeyboardInterrupt

    hook = model.layers[1].register_forward_hook(interrupt)
    for prompts, first_row in ([[1] * 9, [1] * 12], 0), ([[2, 3] * 5], 2):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(prompts, first_row)
        assert engine.lengths == before == [5, 3, 0]
        assert engine.cache.lengths.tolist() == engine.cache.host_lengths
    hook.remove()
    found = engine.step(torch.tensor([8, 9, 0]))
    torch.testing.assert_close(found[0], logits_of(model, [*PROMPTS[0], 5, 8])[-1], **CLOSE)
    torch.testing.assert_close(found[1], logits_of(model, [*PROMPTS[1], 6, 9])[-1], **CLOSE)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_mode_changes_what_an_engine_makes(model, mode):
    def decode() -> list[torch.Tensor]:
        engine = Engine(model, model.new_cache(3, 40))
        found = [engine.prefill(PROMPTS)]
        for _ in range(3):
            found.append(engine.step(torch.tensor([[1, 2], [3, 4], [5, 6]])).clone())
            engine.truncate([n - 1 for n in engine.lengths])
            found.append(engine.step(torch.tensor([7, 8, 9])).clone())
        assert not any(x.requires_grad or x.is_inference() for x in found[:1])
        return found

    expected = decode()
    with mode():
        found = decode()
    assert all(map(torch.equal, found, expected))


def test_what_an_engine_cannot_do_is_said(model):
    engine = Engine(model, model.new_cache(3, 16))
    engine.prefill(PROMPTS)
    for lengths in ([5, 2, 3], [4, 2], [-1, 2, 3]):
        with pytest.raises(ShapeError, match=r"rows that hold \[4, 2, 3\] tokens cannot be"):
            engine.truncate(lengths)
    with pytest.raises(ShapeError, match="a cache whose rows hold"):
        engine.cache.truncate([4, 3, 3])
    for tokens in (torch.ones(3), torch.ones(2).long(), torch.ones(3, 1, 1).long(), NOTHING):
        with pytest.raises(ShapeError, match=r"must be torch.int64 \(3,\) or \(3, T\)"):
            engine.step(tokens)
    for prompts, first_row in ([[1]] * 4, 0), ([[1], [2]], 2), ([[1], []], 0), ([], 0), ([[1]], -1):
        with pytest.raises(PromptError, match="one token or more"):
            engine.prefill(prompts, first_row)
    with pytest.raises(ShapeError, match=r"\(B, T\)"):
        engine.prefill(torch.ones(3).long())
    with pytest.raises(PromptError, match="the cache holds 16 tokens a row"):
        engine.prefill([[1] * 13, [1] * 2])
    with pytest.raises(PromptError, match="the cache holds 16 tokens a row"):
        engine.step(torch.ones(3, 13).long())
    with pytest.raises(IndexError):
        engine.free(3)
    assert engine.lengths == [4, 2, 3] == engine.cache.lengths.tolist()
