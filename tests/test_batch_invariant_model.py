"""The logits of a token have the same bits however many are computed beside it: in a step, in a
batch, in any piece of a prompt."""

from __future__ import annotations

import pytest
import torch

from llama_fast import Llama, LlamaConfig, batch_invariant
from llama_fast.backends import cpu
from llama_fast.model.quantized import quantize_

from .ops.oracle import same_bits

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")

CONFIG = LlamaConfig(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=512, vocab_size=320,
    max_seq_len=160,
)  # fmt: skip
TOKENS = 140  # more than a tile of attention's keys
CUTS = {
    "whole": [TOKENS],
    "a prompt and steps of several": [30, 2, 3, 4, 5, 8, 16, 17, 33, 22],
    "halves": [70, 70],
    "all but one": [TOKENS - 1, 1],
}


def model_of(weights: str) -> Llama:
    torch.manual_seed(0)
    quantized = weights.startswith("int")
    dtype = torch.bfloat16 if quantized else getattr(torch, weights)
    model = Llama(CONFIG, device="cpu").to(dtype)
    if quantized:
        quantize_(model, weights)
    return model


@torch.no_grad()
def logits_of(model: Llama, tokens: torch.Tensor, cut: list[int], kv_cache: str | None):
    """(B, T, V), computed piece by piece of so many tokens."""
    cache = model.new_cache(len(tokens), TOKENS, kv_cache)
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(cut, 1)], 1)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_logits_in_any_company(isa, weights, kv_cache):
    tokens = torch.randint(320, (5, TOKENS), generator=torch.Generator().manual_seed(1))
    with cpu.use_isa(isa), batch_invariant():
        model = model_of(weights)
        steps = logits_of(model, tokens[:1], [1] * TOKENS, kv_cache)
        for name, cut in CUTS.items():
            assert same_bits(logits_of(model, tokens[:1], cut, kv_cache), steps), name
        batch = logits_of(model, tokens, CUTS["a prompt and steps of several"], kv_cache)
        assert same_bits(batch[:1], steps), "among five rows"


def test_a_rollout_and_the_training_step_that_follows_agree():
    """Log-probabilities of generated tokens are those that a loss computes of them, to the bit."""
    tokens = torch.randint(320, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    with batch_invariant():
        model = model_of("bfloat16")
        steps = logits_of(model, tokens, [20, *[1] * (TOKENS - 20)], None)
        assert same_bits(model(tokens).detach(), steps)
