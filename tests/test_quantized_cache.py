"""A KV cache in 8 bits under whole models: its memory, its error, and what its text depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast import Llama, Tokenizer
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import use_backend
from llama_fast.errors import ConfigError
from llama_fast.generation.generate import generate
from llama_fast.nn.kv_cache import KVCache
from tools.demo_model.recipe import held_out_data

DEMO = Path(llama_fast.__file__).parent / "demo"
PROMPTS = ["Once upon a time", "从前", "The cat and the dog walked to the river. They saw a boat"]
FORMS = [None, "int8"]


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_pretrained(DEMO, device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def held_out(tokenizer) -> torch.Tensor:
    data = held_out_data(tokenizer, "combinations", 4096)
    return data.rows(range(len(data)))[0]


@torch.no_grad()
def read(model: Llama, tokens: torch.Tensor, form: str | None, chunk: int) -> torch.Tensor:
    """Log-probabilities (B,T,V), reading `chunk` tokens at a time through a cache."""
    cache = model.new_cache(*tokens.shape, form)
    parts = [model(some, cache=cache) for some in tokens.split(chunk, dim=1)]
    return torch.cat(parts, dim=1).log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each token, in nats."""
    return (expected.exp() * (expected - found)).sum(-1)


def test_it_takes_a_byte_an_element_and_a_scale_a_head():
    config = LlamaConfig.preset("1b")
    sizes = {form: Llama(config, device="meta").new_cache(2, 96, form) for form in FORMS}
    for form, dtype in ((None, torch.float32), ("int8", torch.int8)):
        cache = sizes[form]
        assert cache.dtype is dtype and (cache.batch, cache.max_seq_len) == (2, 96)
        assert cache.nbytes == 2 * 96 * config.kv_bytes_per_token(dtype)
    # 2 · 16 layers · 8 heads · (64 + 4) bytes, of 32,768 in bfloat16
    assert config.kv_bytes_per_token(torch.int8) == 17_408


@pytest.mark.parametrize("chunk", [512, 100])
def test_the_demo_model_hardly_changes(model, held_out, chunk):
    """The bound of weights in 8 bits, which round more."""
    found = divergence(read(model, held_out, None, 512), read(model, held_out, "int8", chunk))
    assert 1e-5 < found.mean() < 2e-4 and found.max() < 2e-2


def test_decoding_is_as_close_as_reading(model, held_out):
    tokens = held_out[:2, :96]
    exact = read(model, tokens, None, 96)
    assert 0 < divergence(exact, read(model, tokens, "int8", 1)).mean() < 2e-4


def test_a_prompt_in_chunks_is_the_whole_prompt(model, held_out):
    """But for the order of sums in torch's product, which differs by the number of rows and the CPU
    (docs/numerics.md): a value between two of 8 bits may become either."""
    tokens = held_out[:2]
    whole = read(model, tokens, "int8", tokens.shape[1])
    assert divergence(whole, read(model, tokens, "int8", 100)).abs().mean() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_the_eager_definition_reads_and_writes_the_same_cache(model, held_out, form):
    tokens = held_out[:2, :64]
    with use_backend("eager"):
        eager = read(model, tokens, form, 16)
    assert divergence(eager, read(model, tokens, form, 16)).mean() < 3e-4


def test_text_depends_on_the_prompt_and_the_seed_alone(model, tokenizer):
    arguments = {"max_new_tokens": 24, "temperature": 0.8, "kv_cache": "int8"}
    seeds = [5, 6, 7]
    together = generate(model, tokenizer, PROMPTS, seed=seeds, **arguments)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = generate(model, tokenizer, PROMPTS, seed=seeds, **arguments)
    finally:
        torch.set_num_threads(before)
    alone = [
        generate(model, tokenizer, prompt, seed=seed, **arguments)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == again
    # Products of a batch may be summed in another order than those of one prompt: see numerics.md.
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert all(len(completion.tokens) > 8 for completion in together)


def test_generation_reads_the_cache_that_was_asked_for(model, tokenizer, monkeypatch):
    made = []
    of = KVCache.__init__

    def noting(self, *args, **arguments):
        of(self, *args, **arguments)
        made.append(self.dtype)

    monkeypatch.setattr(KVCache, "__init__", noting)
    texts = [
        generate(model, tokenizer, PROMPTS[0], max_new_tokens=8, temperature=0, kv_cache=form)
        for form in FORMS
    ]
    assert made == [torch.bfloat16, torch.int8]
    assert texts[0][0].tokens[:4] == texts[1][0].tokens[:4]
    assert texts[0][0].logprobs != texts[1][0].logprobs


@pytest.mark.parametrize("name", ["int4", "bfloat16", "", torch.int8, ["int8"], 8])
def test_other_names_are_refused_before_anything_is_read(model, tokenizer, name):
    with pytest.raises(ConfigError, match=r"kv_cache is .* it must be 'int8', or None"):
        generate(model, tokenizer, "a", kv_cache=name)
    with pytest.raises(ConfigError, match="kv_cache is"):
        model.new_cache(1, 8, name)
