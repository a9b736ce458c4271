"""A model given a row of packed documents computes what it does of each document alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import ShapeError
from llama_fast.model import Llama
from llama_fast.nn import RotaryEmbedding

CONFIG = LlamaConfig(
    vocab_size=67, dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=80,
    max_seq_len=24,
)  # fmt: skip
LENGTHS = (7, 1, 0, 24, 12)  # of which the sum is more than the context


def model(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(CONFIG, device="cpu", dtype=torch.float32)


def ends(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def documents(lengths=LENGTHS) -> list[torch.Tensor]:
    """(1, length) each."""
    made = torch.Generator().manual_seed(1)
    return [torch.randint(CONFIG.vocab_size, (1, n), generator=made) for n in lengths]


def targets_of(document: torch.Tensor) -> torch.Tensor:
    return torch.cat((document[:, 1:], torch.full((1, min(1, document.shape[1])), -100)), 1)


def gradients(a_model: Llama, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*a_model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_loss_and_gradients_are_the_sum_of_the_documents():
    m, each = model(), documents()
    targets = [targets_of(x) for x in each]
    counts = [int((t != -100).sum()) for t in targets]
    alone = sum(m.loss(x, t) * n for x, t, n in zip(each, targets, counts, strict=True) if n) / sum(
        counts
    )
    packed = m.loss(torch.cat(each, 1), torch.cat(targets, 1), cu_seqlens=ends(LENGTHS))
    assert abs(packed.item() - alone.item()) <= 1e-6
    expected, actual = gradients(m, alone), gradients(m, packed)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


def test_logits_are_those_of_the_documents():
    m, each = model(), documents()
    with torch.inference_mode():
        packed = m(torch.cat(each, 1), cu_seqlens=ends(LENGTHS)).split(LENGTHS, dim=1)
        for x, logits in zip(each, packed, strict=True):
            if x.numel():
                torch.testing.assert_close(logits, m(x), rtol=1e-5, atol=1e-5)
        last = m(torch.cat(each, 1), cu_seqlens=ends(LENGTHS), last_only=True)
        assert last.shape == (1, 1, CONFIG.vocab_size)


@pytest.mark.parametrize("other", ["tokens", "NaN"])
def test_a_document_sees_nothing_of_another(other):
    """Other tokens, or a token whose embedding is NaN, change no bit beside their document."""
    m, each = model(), documents((9, 12, 5))
    with torch.no_grad():
        m.embed.weight[66] = 0.1
        for x in each:
            x.clamp_(max=65)
        cu_seqlens = ends((9, 12, 5))
        before = m(torch.cat(each, 1), cu_seqlens=cu_seqlens)
        each[1] = torch.full_like(each[1], 66)
        if other == "NaN":
            m.head.weight = torch.nn.Parameter(m.head.weight.clone())  # it may be the embedding
            m.embed.weight[66] = torch.nan
        after = m(torch.cat(each, 1), cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, :9], after[:, :9])
    assert torch.equal(before[:, 21:], after[:, 21:])
    assert not torch.equal(before[:, 9:21], after[:, 9:21])


def test_positions_restart_at_each_document():
    rope = RotaryEmbedding(16, 24)
    cos, sin = rope(sum(LENGTHS), ends(LENGTHS))
    t = torch.cat([torch.arange(n) for n in LENGTHS])
    assert torch.equal(cos, rope.cos[t]) and torch.equal(sin, rope.sin[t])


def test_a_compiled_model_packs_too():
    m, tokens, cu_seqlens = model(), torch.cat(documents(), 1), ends(LENGTHS)
    targets = torch.cat([targets_of(x) for x in documents()], 1)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t, y, c: m.loss(t, y, cu_seqlens=c), backend="aot_eager", fullgraph=True
    )
    expected = m.loss(tokens, targets, cu_seqlens=cu_seqlens)
    actual = compiled(tokens, targets, cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    wanted = gradients(m, expected)
    for name, gradient in gradients(m, actual).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.zeros(B, T, dtype=torch.int64)


BAD = [
    (
        "a document beyond the context",
        tokens(1, 30),
        [0, 5, 30],
        r"document 1 .* has 25 tokens.*24",
    ),
    ("two rows", tokens(2, 8), [0, 8], "lie in one row, but there are B = 2"),
    ("an end too early", tokens(1, 8), [0, 7], r"ends with 7 and there are T = 8"),
    ("a beginning too late", tokens(1, 8), [1, 8], r"cu_seqlens\[0\] is 1"),
    ("falling ends", tokens(1, 8), [0, 5, 4, 8], r"falls from 5 to 4 at index 2"),
]


@pytest.mark.parametrize(("name", "tokens", "cu_seqlens", "message"), BAD)
def test_what_is_refused(name, tokens, cu_seqlens, message):
    with pytest.raises(ShapeError, match=message):
        model()(tokens, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


def test_int64_is_refused_and_so_is_a_cache():
    m, x = model(), tokens(1, 8)
    with pytest.raises(ShapeError, match=r"cu_seqlens is torch.int64.*\.to\('cpu', torch.int32\)"):
        m.loss(x, x, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ShapeError, match="cu_seqlens and a cache"):
        m(x, cu_seqlens=ends([8]), cache=m.new_cache(1, 8))
    with pytest.raises(ShapeError, match=r"30 tokens were given.*context is 24.*cu_seqlens"):
        m(tokens(1, 30))
