"""Long prompts: what they take of memory, and that their text is right near the context's end."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import import_module

import pytest
import torch

from llama_fast.backends import cpu
from llama_fast.bench.plan import activations
from llama_fast.cli.options import DEMO
from llama_fast.config import LlamaConfig, RopeScaling
from llama_fast.config.share import Share
from llama_fast.dispatch import use_backend
from llama_fast.errors import PromptError
from llama_fast.generation import engine as engines
from llama_fast.generation.engine import Engine, prefill_chunk
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer

from .tensor_memory import peak_of_tensors

LAST = 131072  # positions of Llama 3.1
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=160, vocab_size=300,
    max_seq_len=LAST, rope_scaling=RopeScaling(8.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG)


def prefill_peak(model: Llama, batch: int, tokens: int) -> int:
    engine = Engine(model, model.new_cache(batch, tokens))
    prompts = torch.randint(300, (batch, tokens))
    with torch.inference_mode():
        return peak_of_tensors(lambda: engine.prefill(prompts))


@pytest.mark.skipif(not cpu._cpu, reason="needs the C++ kernels, whose tensors are counted")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prefill_takes_what_is_stated_however_long(model, monkeypatch, batch):
    monkeypatch.setattr(engines, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(engines, "PREFILL_TOKENS", 96)
    config = dataclasses.replace(CONFIG, max_seq_len=1024)
    stated = activations(Share(config, 0, 1), batch, torch.float32)
    short, long = (prefill_peak(model, batch, tokens) for tokens in (prefill_chunk(batch), 1024))
    assert short / 2 < long <= stated
    # What grows are the ids of the prompts, 8 bytes each.
    assert long <= short + batch * 1024 * 8
    # And it is not far too much that is stated.
    assert stated < 2 * long


def test_the_chunks_of_a_batch():
    assert [prefill_chunk(batch) for batch in (1, 4, 5, 64, 4096, 5000)] == [
        1024, 1024, 819, 64, 1, 1
    ]  # fmt: skip


def test_the_definition_of_attention_takes_a_block_of_scores(monkeypatch):
    """Twice the queries take no more, but for their own size; and the result is the same."""
    module = import_module("llama_fast.ops.attention")
    q = torch.randn(1, 128, 4, 16)
    k, v = (torch.randn(1, 4096, 2, 16) for _ in "kv")
    for need_lse in (False, True):
        run = partial(module.eager, k=k, v=v, need_lse=need_lse)
        scores = 16 * 4 * 4096
        whole = run(q)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BLOCK", scores)
            parts = run(q)
            peaks = [peak_of_tensors(partial(run, part)) for part in (q[:, :64], q)]
        assert peaks[1] < peaks[0] + 4 * q.nbytes
        assert peaks[1] < 8 * 4 * scores < peak_of_tensors(partial(run, q))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_prompt_near_the_end_of_the_context():
    """The demo model, with a context of more than two chunks."""
    source = Llama.from_pretrained(DEMO)
    config = dataclasses.replace(source.config, max_seq_len=2304)
    model = Llama(config, dtype=torch.float32).eval()
    model.load_state_dict(source.state_dict())
    tokenizer = Tokenizer.from_pretrained(DEMO)
    text = "Once upon a time there was a little girl. " * 300
    prompt = tokenizer.encode(text)[: config.max_seq_len - 3]
    (made,) = generate(model, tokenizer, [prompt], max_new_tokens=10, temperature=0)
    assert made.finish_reason == "length" and len(made.tokens) == 3
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *made.tokens[:-1]]]))
    assert logits[0, -3:].argmax(-1).tolist() == made.tokens
    with pytest.raises(PromptError, match="2304"):
        generate(model, tokenizer, [[*prompt, 5, 5, 5]], max_new_tokens=1)


@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_the_last_tokens_of_a_full_context(model, kv_cache):
    """131,072 slots, all but the last of which are taken as they are: what no prompt has filled."""
    logits = {}
    for backend in ("eager", "cpu") if cpu._cpu else ("eager",):
        g = torch.Generator().manual_seed(0)
        cache = model.new_cache(1, LAST, kv_cache)
        for x in cache.tensors():
            if x.dtype is torch.int8:
                x.random_(-127, 128, generator=g)
            else:
                x.uniform_(*((0.01, 0.02) if kv_cache else (-2, 2)), generator=g)
        cache.restart(0, LAST - 7)
        with use_backend(backend, strict=True):
            engine = Engine(model, cache)
            found = [engine.prefill([[1, 2, 3, 4, 5]])]
            found += [engine.step(torch.tensor([token])).clone() for token in (6, 7)]
            assert engine.lengths == [LAST]
            with pytest.raises(PromptError, match="131072"):
                engine.step(torch.tensor([8]))
        logits[backend] = torch.cat(found)
    assert logits["eager"].isfinite().all()
    torch.testing.assert_close(logits["eager"], [*logits.values()][-1], rtol=1e-3, atol=1e-4)
