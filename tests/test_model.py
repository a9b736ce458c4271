"""The model against transformers' on the same random checkpoints, and against itself."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
import transformers

from llama_fast.config import LlamaConfig, RopeScaling
from llama_fast.dispatch import use_backend
from llama_fast.errors import PromptError, ShapeError
from llama_fast.model import Llama

TOKENS = 40


def hf_config(H: int, K: int, D: int, tied: bool, scaled: bool, **more) -> transformers.LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaled:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return transformers.LlamaConfig(
        hidden_size=H * 16,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D,
        vocab_size=257,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def hf_model(config: transformers.LlamaConfig) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():  # norms of ones would hide a wrong weight
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.08)
    return model


def tokens(batch: int = 2, count: int = TOKENS) -> torch.Tensor:
    return torch.randint(257, (batch, count), generator=torch.Generator().manual_seed(1))


SHAPES = [(H, K) for H, K in ((4, 4), (4, 2), (6, 2), (8, 2), (8, 1))]  # G = 1, 2, 3, 4, 8


@pytest.mark.parametrize(
    ("H", "K", "D", "tied", "scaled"),
    [
        (*heads, D, tied, scaled)
        for heads, D, (tied, scaled) in itertools.product(
            SHAPES, (64, 128), ((False, True), (True, False))
        )
    ],
)
def test_logits_equal_transformers(tmp_path, H, K, D, tied, scaled):
    theirs = hf_model(hf_config(H, K, D, tied, scaled))
    theirs.save_pretrained(tmp_path / "hf")
    ours = Llama.from_pretrained(tmp_path / "hf", device="cpu")
    with torch.no_grad():
        expected = theirs(tokens()).logits
        logits = ours(tokens())
        cached = ours(tokens(), cache=ours.new_cache(2, TOKENS))
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1e-4
    assert (cached - expected).abs().max() <= 1e-4

    ours.save_pretrained(tmp_path / "meta", format="meta")
    from_meta = Llama.from_pretrained(tmp_path / "meta", device="cpu")
    with torch.no_grad():
        assert torch.equal(from_meta(tokens()), logits)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(("H", "K", "D"), [(4, 1, 64), (6, 2, 128)])
def test_bfloat16_is_as_exact_as_transformers(tmp_path, H, K, D, backend):
    theirs = hf_model(hf_config(H, K, D, False, True)).bfloat16()
    theirs.save_pretrained(tmp_path / "hf")
    ours = Llama.from_pretrained(tmp_path / "hf", device="cpu")
    assert ours.dtype == torch.bfloat16
    with torch.no_grad(), use_backend(backend):
        logits = ours(tokens())
        theirs_bf16 = theirs(tokens()).logits.float()
        exact = Llama.from_pretrained(tmp_path / "hf", device="cpu", dtype=torch.float64)
    with torch.no_grad(), use_backend("eager"):
        exact = exact(tokens())
    error, allowed = (logits - exact).abs(), (theirs_bf16 - exact).abs()
    assert error.max() <= 2 * allowed.max()
    assert error.square().mean() <= 4 * allowed.square().mean()


CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=96, vocab_size=257,
    max_seq_len=256, rope_scaling=RopeScaling(8.0),
)  # fmt: skip


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG, device="cpu")


def test_chunks_and_decode_equal_the_whole(model):
    whole = model(tokens())
    cache = model.new_cache(2, TOKENS)
    parts = [model(part, cache=cache) for part in tokens().split([17, 1, 9, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_left_padding_changes_nothing(model):
    long, short = tokens(1, 30), tokens(1, 11)
    cache = model.new_cache(2, 40)
    cache.reset([0, 19])
    both = torch.cat([long, torch.cat([torch.zeros(1, 19, dtype=torch.int64), short], 1)])
    logits = model(both, cache=cache)
    torch.testing.assert_close(logits[:1], model(long), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:, 19:], model(short), rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [30, 11] and cache.used == 30


def test_last_only_is_the_last(model):
    full = model(tokens())
    torch.testing.assert_close(model(tokens(), last_only=True), full[:, -1:])


def test_gradients_equal_eager(model):
    def gradients():
        model.zero_grad()
        model.loss(tokens()[:, :-1], tokens()[:, 1:]).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    fast = gradients()
    with use_backend("eager"):
        eager = gradients()
    for a, b in zip(fast, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_backward_pass_keeps_no_memory_beside_its_tensors(model):
    """A part of a larger tensor, as v is of q, k and v, would keep all of it."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    size, parts = {}, defaultdict(dict)

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.ndim > 2 and storage.data_ptr() not in weights:
            size[storage.data_ptr()] = storage.nbytes()
            parts[storage.data_ptr()][x.storage_offset()] = x.nbytes  # gate and up share theirs
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(tokens()[:, :-1], tokens()[:, 1:])
    assert len(size) > 10 and loss.requires_grad
    assert size == {at: sum(of.values()) for at, of in parts.items()}


def test_a_cast_keeps_the_rope_tables(model):
    cos = model.rope.cos.clone()
    model.bfloat16()
    assert model.rope.cos.dtype == torch.float32
    assert torch.equal(model.rope.cos, cos)


def test_compiles_in_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def test_a_full_cache_says_so(model):
    cache = model.new_cache(1, 8)
    model(tokens(1, 8), cache=cache)
    with pytest.raises(PromptError, match="holds 8 tokens"):
        model(tokens(1, 1), cache=cache)


def test_a_cache_longer_than_the_context_is_refused(model):
    with pytest.raises(PromptError, match="context"):
        model.new_cache(1, 257)


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)])
def test_tokens_of_a_wrong_kind_are_refused(model, bad):
    with pytest.raises(ShapeError, match="int64"):
        model(bad)


def test_more_tokens_than_the_context_are_refused(model):
    with pytest.raises(ShapeError, match="context is 256"):
        model(tokens(1, 257))
