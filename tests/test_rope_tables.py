"""The inverse frequencies of RoPE and the cos and sin tables."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast.config import PRESETS, RopeScaling
from llama_fast.nn.rope import inverse_frequencies, rope_tables

# FACTS, section 2: head_dim, factor → golden values; the first blended and the first stretched.
GOLDEN = [
    (128, 8, {31: 8.5675141e-4, 35: 9.5562124e-5, 63: 3.0689260e-7}, 29, 35),
    (64, 32, {15: 1.2905479e-3, 16: 4.2955680e-4, 31: 9.4183067e-8}, 15, 18),
    (128, 32, {31: 7.6254120e-4}, 29, 35),
]


@pytest.mark.parametrize(("head_dim", "factor", "golden", "blended", "stretched"), GOLDEN)
def test_golden_inverse_frequencies(head_dim, factor, golden, blended, stretched):
    plain = inverse_frequencies(head_dim)
    scaled = inverse_frequencies(head_dim, scaling=RopeScaling(factor))
    assert scaled.dtype == torch.float32
    assert scaled.shape == (head_dim // 2,)
    for index, value in golden.items():
        assert scaled[index].item() == pytest.approx(value, rel=1e-7)
    assert torch.equal(scaled[:blended], plain[:blended])
    between = slice(blended, stretched)
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / factor).all()
    torch.testing.assert_close(scaled[stretched:], plain[stretched:] / factor, rtol=2e-7, atol=0)


def test_plain_frequencies():
    plain = inverse_frequencies(128, 500000.0)
    expected = [500000.0 ** (-2 * i / 128) for i in range(64)]
    assert plain.tolist() == pytest.approx(expected, rel=6e-8)


@pytest.mark.parametrize("name", ["1b", "3b", "8b", "8b-3.1", "405b"])
def test_frequencies_agree_with_transformers(name):
    transformers = pytest.importorskip("transformers", reason="compares with its frequencies")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = PRESETS[name]
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config.to_hf())).inv_freq
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_tables_are_rounded_once():
    positions = 9000  # more than two blocks
    cos, sin = rope_tables(64, positions, scaling=RopeScaling(32.0))
    assert cos.shape == sin.shape == (positions, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 4095, 4096, 8191, 8192, 8999):
        for i in (0, 14):  # unscaled frequencies, which need no second formula here
            angle = position * 500000.0 ** (-2 * i / 64)
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=3e-8, rel=6e-8)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=3e-8, rel=6e-8)


def test_tables_of_no_positions():
    cos, sin = rope_tables(128, 0)
    assert cos.shape == sin.shape == (0, 64)
