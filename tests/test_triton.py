"""The whole model on the Triton backend, beside the eager one; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llama_fast.backends import triton
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, use_backend
from llama_fast.model import Llama
from tests.ops.oracle import as_tuple, assert_accurate, of_op, run_poisoned
from tests.ops.test_library import FORMS, leaves

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (GPU or triton.INTERPRETED), reason="this needs a GPU, or Triton's interpreter"
)
CONFIG = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=97,
    max_seq_len=64,
)


def model_and_tokens() -> tuple[Llama, torch.Tensor]:
    torch.manual_seed(0)
    model = Llama(CONFIG).to(DEVICE)
    return model, torch.randint(CONFIG.vocab_size, (2, 19), device=DEVICE)


def loss_and_gradients(model: Llama, tokens: torch.Tensor, backend: str) -> tuple:
    model.zero_grad()
    with use_backend(backend, strict=True):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_loss_and_gradients_of_the_model():
    model, tokens = model_and_tokens()
    loss, gradients = loss_and_gradients(model, tokens, "triton")
    expected_loss, expected = loss_and_gradients(model, tokens, "eager")
    assert abs(loss - expected_loss) < 1e-5
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_are_the_same_bits_each_time():
    model, tokens = model_and_tokens()
    first = loss_and_gradients(model, tokens, "triton")[1]
    second = loss_and_gradients(model, tokens, "triton")[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", [None, "int8"])
def test_decoding_with_a_cache(form):
    model, tokens = model_and_tokens()

    def read(backend: str) -> torch.Tensor:
        cache = model.new_cache(2, 32, form)
        cache.reset([0, 3])  # a prompt that is padded on the left
        with torch.no_grad(), use_backend(backend, strict=True):
            logits = [model(part, cache=cache) for part in tokens.split((15, 2, 1, 1), dim=1)]
        return torch.cat(logits, 1)[1, 3:], torch.cat(logits, 1)[0]

    for found, expected in zip(read("triton"), read("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), use_backend("eager"):
        whole = model(tokens)[0]
    allowed = 1e-4 if form is None else 0.05
    torch.testing.assert_close(read("triton")[1], whole, rtol=allowed, atol=allowed)


def test_activation_checkpointing():
    model, tokens = model_and_tokens()
    cos, sin = model.rope(tokens.shape[1])
    block, x = model.layers[0], model.embed(tokens).detach()

    def gradient(through) -> torch.Tensor:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_backend("triton", strict=True):
            update, residual = through(leaf)
            (update.sum() + residual.square().sum()).backward()
        return leaf.grad

    plain = gradient(lambda leaf: block(None, leaf, cos, sin, None))
    again = gradient(
        lambda leaf: checkpoint(block, None, leaf, cos, sin, None, use_reentrant=False)
    )
    assert torch.equal(plain, again)


@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "rope", "attention", "linear_cross_entropy"]
)
def test_opcheck(name):
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in FORMS[name][1])
    with use_backend("triton", strict=True):
        torch.library.opcheck(OPS[name].torch_op, leaves(OPS[name], args))


def test_rows_without_keys_and_nan_behind_the_length():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 6, 64, generator=g).to(DEVICE)
    k, v = (torch.randn(3, 40, 2, 64, generator=g).to(DEVICE) for _ in "kv")
    lengths = torch.tensor([40, 0, 17], device=DEVICE)
    for x in (k, v):
        x[1], x[2, 17:] = float("nan"), float("nan")
    op = OPS["attention"]
    with use_backend("triton", strict=True), torch.no_grad():
        o, lse = op(q, k, v, True, None, lengths, True)
        dq, dk, dv = as_tuple(OPS["attention_backward"](q, q, k, v, o, lse, True, None, lengths))
    assert not o[1].any() and (lse[1] == -float("inf")).all() and torch.isfinite(o).all()
    for gradient in (dq, dk, dv):
        assert torch.isfinite(gradient).all() and not gradient[1].any()
    assert not dk[2, 17:].any() and not dv[2, 17:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_rows_beyond_the_registers(name, dtype):
    """Rows of another stride, in chunks, the last of them not whole."""
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 33000, generator=g).to(DEVICE, dtype)[:, :32801] for _ in "xr")
    weight = torch.randn(32801, generator=g).to(DEVICE, dtype)
    op = OPS[name]
    args = (x, weight, 1e-5) if name == "rms_norm" else (x, residual, weight, 1e-5)
    with use_backend("triton", strict=True), torch.no_grad():
        assert_accurate(run_poisoned(op, args), of_op(op, args), f"rows of 32801 in {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_rows_beyond_the_registers(dtype):
    """Rows in chunks, the last of them not whole, and more rows than a program takes at once."""
    g = torch.Generator().manual_seed(0)
    x, grad, addend = (torch.randn(41, 8200 + 24, generator=g)[:, :8201] for _ in range(3))
    weight = torch.randn(8201, generator=g)
    args = [t.to(DEVICE, dtype) for t in (grad, addend, x, weight)]
    op = OPS["add_rms_norm_backward"]
    with use_backend("triton", strict=True), torch.no_grad():
        actual = run_poisoned(op, (*args, 1e-5))
    assert_accurate(actual, of_op(op, (*args, 1e-5)), f"rows of 8201 in {dtype}")


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("G", [1, 3, 7, 16])
def test_groups_and_head_dims(G, D):
    """H = G · K at every head dim, views of larger tensors, and a row of the batch without keys."""
    g = torch.Generator().manual_seed(G * D)
    q = torch.randn(2, 17, G, 2 * D, generator=g).to(DEVICE, torch.bfloat16)[..., :D]
    k, v = (torch.randn(2, 1, 23, D, generator=g).to(q).transpose(1, 2) for _ in "kv")
    lengths = torch.tensor([23, 0], device=DEVICE)
    with use_backend("triton", strict=True), torch.no_grad():
        op, args = OPS["attention"], (q, k, v, True, None, lengths, True)
        o, lse = run_poisoned(op, args)
        assert_accurate((o, lse), of_op(op, args), f"G {G}, D {D}")
        op, args = OPS["attention_backward"], (q.sin(), q, k, v, o, lse, True, None, lengths)
        gradients = run_poisoned(op, args)
    assert_accurate(gradients, of_op(op, args), f"gradient, G {G}, D {D}")
    assert not o[1].any() and not any(x[1].any() for x in gradients)
