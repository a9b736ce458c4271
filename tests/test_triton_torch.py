"""What torch does around the ops, with the Triton backend: compile, autocast, CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from llama_fast import ops
from llama_fast.dispatch import backends, use_backend
from llama_fast.model import Llama
from llama_fast.triton_kernels import (
    aot,
    attention,
    chips,
    cross_entropy,
    kv_append,
    rms_norm,
    rope,
    shapes,
    swiglu,
)
from llama_fast.triton_kernels.launch import record

from .ops.test_library import FORMS, leaves
from .test_triton import CONFIG, DEVICE, loss_and_gradients, model_and_tokens, pytestmark  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def on_triton():
    torch._dynamo.reset()
    with use_backend("triton", strict=True):
        yield


def batch(model: Llama, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T)
    return torch.randint(CONFIG.vocab_size, (2, T), generator=generator).to(model.device)


OF_TRITON = set(backends()["triton"].implementations)
# Triton has no product of floats.
SERVED = [form for form, (op, *_) in FORMS.items() if op.name in OF_TRITON and form != "linear"]


@pytest.mark.parametrize("form", SERVED)
def test_opcheck(form):
    """Of what Triton has: schema, fake and gradient are what torch.library asks for."""
    op, args, with_gradient = FORMS[form]
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(op.torch_op, leaves(op, args) if with_gradient else args)


def test_training_compiles_once_for_all_lengths():
    """No graph break (fullgraph), and the same graph for each length of the context."""
    model, _ = model_and_tokens()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(model.loss, fullgraph=True, dynamic=True, backend=counter)
    compiled_for = []
    for T in (7, 16, 3):
        tokens = batch(model, T + 1)
        given = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        model.zero_grad()
        found = loss(*given)
        found.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = model.loss(*given)
        expected.backward()
        assert torch.equal(found, expected)
        assert all(
            torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True)
        )
        compiled_for.append(counter.frame_count)
    assert len(set(compiled_for)) == 1, compiled_for


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_decode_step_compiles_once_for_all_lengths(form):
    model, _ = model_and_tokens()
    prompt, steps = batch(model, 5), [batch(model, 1) for _ in range(4)]
    with torch.no_grad():
        cache = model.new_cache(2, 16, form)
        model(prompt, cache=cache)
        expected = [model(tokens, cache=cache) for tokens in steps]

        cache = model.new_cache(2, 16, form)
        model(prompt, cache=cache)
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(
            lambda tokens: model(tokens, cache=cache), fullgraph=True, backend=counter
        )
        for tokens, wanted in zip(steps, expected, strict=True):
            cache.count(1)
            with cache.whole():
                torch.testing.assert_close(step(tokens), wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1 and cache.used == 9


@pytest.mark.parametrize("compiled", [False, True])
def test_training_under_autocast(compiled):
    """Products are in bfloat16, norms and the loss in float32, gradients in the weights' dtype."""
    model, tokens = model_and_tokens()
    expected, _ = loss_and_gradients(model, tokens, "triton")
    model.zero_grad()
    loss = model.loss
    if compiled:
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    found.backward()
    assert found.dtype == torch.float32 and 0 < abs(found.item() - expected) < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


def test_dtypes_under_autocast():
    x, weight = torch.randn(3, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    half = x.bfloat16()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert ops.linear(x, torch.randn(8, 32, device=DEVICE)).dtype == torch.bfloat16
        assert ops.rms_norm(half, weight).dtype == torch.float32  # the widest, as torch promotes
        assert ops.rms_norm(half, weight.bfloat16()).dtype == torch.bfloat16
        assert ops.swiglu(x, half).dtype == torch.float32
        q = torch.randn(1, 3, 2, 16, device=DEVICE)
        assert ops.attention(q, q, q.bfloat16()).dtype == torch.bfloat16
        tables = torch.rand(8, 8, device=DEVICE), torch.rand(8, 8, device=DEVICE)
        caches = [torch.zeros(1, 8, 2, 16, device=DEVICE) for _ in "kv"]
        k = q.bfloat16()
        lengths = torch.tensor([3], device=DEVICE)
        assert ops.kv_append(q, k, k, *tables, *caches, lengths).dtype == torch.float32
        assert caches[1][0, :3].any()  # written themselves, not a copy of another dtype


def test_a_compiled_and_checkpointed_block():
    model, tokens = model_and_tokens()
    cos, sin = model.rope(tokens.shape[1])
    block, x = model.layers[0], model.embed(tokens).detach()

    def gradient(through) -> torch.Tensor:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        update, residual = through(leaf)
        (update.sum() + residual.square().sum()).backward()
        return leaf.grad

    def again(leaf: torch.Tensor) -> tuple:
        return checkpoint(block, None, leaf, cos, sin, None, use_reentrant=False)

    expected = gradient(lambda leaf: block(None, leaf, cos, sin, None))
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), expected, rtol=1e-6, atol=1e-6)


def test_no_launch_reads_a_value():
    """What is launched depends on shapes alone, so a CUDA graph may capture it: on tensors of the
    meta device, which have no values, every read of one raises."""
    launched = set()
    with chips.assume(chips.CHIPS["sm_90"]):
        for stem, launcher, args in aot.calls(brief=True):
            with record() as launches:
                getattr(import_module(f"llama_fast.triton_kernels.{stem}"), launcher)(*args)
            launched |= {launch.kernel.__name__ for launch in launches}
    assert {"attention_fwd_kernel", "cross_entropy_kernel", "kv_append_kernel"} <= launched
    assert "kv_append_quantized_kernel" in launched


def variants(T: int, S: int) -> set[str]:
    """The compiled variants that a forward and a backward pass of these lengths take."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = empty(2, T, 4096), empty(4096)
    q, k, v = empty(2, T, 48, 128).split((32, 8, 8), dim=2)
    caches = [empty(2, 8, 4096, 128).transpose(1, 2) for _ in "kv"]
    (k8, k_scale), (v8, v_scale) = (
        [part[:, :S] for part in shapes.quantized(cache)] for cache in caches
    )
    caches = [cache[:, :S] for cache in caches]
    tables = [empty(T, 64, dtype=torch.float32) for _ in "cs"]
    lse = empty(2, 32, T, dtype=torch.float32)
    lengths, targets = empty(2, dtype=torch.int64), empty(2, T, dtype=torch.int64)
    with chips.assume(chips.CHIPS["sm_90"]), record() as launches:
        rms_norm.rms_norm(x, weight, 1e-5)
        rms_norm.rms_norm_backward(x, x, weight, 1e-5)
        swiglu.swiglu(*empty(2, T, 28672).chunk(2, -1))
        rope.rope(q, k, *tables, False)
        kv_append.kv_append(q, k, v, *tables, *caches, lengths, False)
        attention.attention(q, *caches, True, None, lengths, True)
        kv_append.kv_append(q, k, v, *tables, k8, v8, lengths, False, k_scale, v_scale)
        attention.attention(q, k8, v8, True, None, lengths, False, k_scale, v_scale)
        attention.attention_backward(q, q, *caches, q, lse, True, None, lengths)
        cross_entropy.linear_cross_entropy(x, empty(128256, 4096), targets, -100, True, True)
    return {str(aot.specialise(launch)) + str(launch.options) for launch in launches}


def count_variants() -> int:
    lengths = ((512, 1024), (511, 1000), (700, 777), (1023, 1023), (2048, 4096))
    return len(set.union(*(variants(T, S) for T, S in lengths))) - len(variants(512, 1024))


def test_no_kernel_is_compiled_again_for_another_length():
    """In a process of its own: the interpreter does not know what a kernel is compiled for."""
    code = "from tests.test_triton_torch import count_variants; print(count_variants())"
    environment = dict(os.environ, TRITON_INTERPRET="0")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout == "0\n", done.stdout + done.stderr[-2000:]
