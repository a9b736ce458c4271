"""transformers' continuous batching (`generate_batch`) over patched models."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

import llama_fast
from llama_fast.dispatch import wrapped_launches
from llama_fast.hf import paged
from tests.hf_models import model, tokens

if not paged.KNOWN:
    pytest.skip(
        "needs a transformers whose paged cache is given a step's arguments in a dict",
        allow_module_level=True,
    )

NEW = 12
PROMPTS = [tokens(1, count)[0].tolist() for count in (5, 21, 1, 40)]
# Blocks so small that a sequence has several of them, and steps that hold prompts in part.
CACHE = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 32}


def batch(net: torch.nn.Module) -> tuple[list[list[int]], Counter]:
    """The new tokens of each prompt, and how often each op was launched."""
    launched = Counter()

    def count(op, backend, launch):
        def run(*args):
            launched[op.name] += 1
            return launch(*args)

        return run

    settings = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with wrapped_launches(count):
        found = net.generate_batch(
            inputs=PROMPTS,
            generation_config=settings,
            continuous_batching_config=transformers.ContinuousBatchingConfig(**CACHE),
        )
    return [found[key].generated_tokens for key in sorted(found)], launched


def one_by_one(net: torch.nn.Module) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "do_sample": False}
    rows = [(prompt, net.generate(torch.tensor([prompt]), **settings)) for prompt in PROMPTS]
    return [row[0, len(prompt) :].tolist() for prompt, row in rows]


# Each family meets one kind of attention; Llama meets both.
PAIRS = [("Llama", "sdpa"), ("Llama", "eager"), ("Mistral", "eager"), ("Qwen3", "sdpa")]
REST = [
    pytest.param(*pair, marks=pytest.mark.thorough)
    for pair in (("Mistral", "sdpa"), ("Qwen3", "eager"))
]


@pytest.mark.parametrize(("family", "attention"), [*PAIRS, *REST])
def test_the_tokens_of_generate(family, attention):
    settings = {"sliding_window": None} if family == "Mistral" else {}
    net = model(family, attn_implementation=attention, **settings)
    own = one_by_one(net)
    llama_fast.patch(net)
    given, launched = batch(net)
    assert given == own
    assert launched["attention"] and launched["rope"] and launched["rms_norm"]
    assert one_by_one(net) == own
    assert net.config._attn_implementation == attention


@pytest.mark.parametrize("what", ["a window", "float64", "heads"])
def test_what_the_op_cannot_serve_is_transformers_own(what):
    families = {
        "a window": ("Mistral", {"sliding_window": 8}),
        "float64": ("Llama", {}),
        "heads": ("Llama", {"head_dim": 12}),
    }
    family, settings = families[what]
    net = model(family, attn_implementation="sdpa", **settings)
    if what == "float64":
        net = net.double()
    own = one_by_one(net)
    llama_fast.patch(net)
    given, launched = batch(net)
    assert given == own
    assert not launched["attention"]


def test_a_step_with_padded_sequences():
    """Compiled and captured steps have tokens of no sequence behind the last one."""
    q, k, v = (torch.randn(1, heads, 6, 16) for heads in (4, 2, 2))

    class Cache(transformers.generation.continuous_batching.PagedAttentionCache):
        def __init__(self):
            pass

        def update(self, key_states, value_states, layer_idx, kwargs):
            kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
            return key_states, value_states

    ends = torch.tensor([0, 2, 5, 5], dtype=torch.int32)
    step = {
        "cache": Cache(),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": {"full_attention": ends},
        "max_length_q": 3,
        "max_length_k": {"full_attention": 3},
    }
    net = model()
    layer = net.model.layers[0].self_attn
    given, _ = paged_attention(layer, q, k, v, **step)
    for at in (slice(0, 2), slice(2, 5)):
        alone, _ = paged_attention(layer, q[:, :, at], k[:, :, at], v[:, :, at])
        torch.testing.assert_close(given[:, at], alone, rtol=0, atol=1e-6)
    assert not given[:, 5:].any()


def paged_attention(layer, q, k, v, **step):
    def refuse(*args, **kwargs):
        raise AssertionError("the op was to serve it")

    return llama_fast.hf.attention.attend(refuse, layer, q, k, v, None, scaling=0.25, **step)
