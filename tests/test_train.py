"""The training loop: what it computes, how it ends, and that it goes on to the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.errors import ConfigError, LlamaFastError
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.training.adapter import lora
from llama_fast.training.blocks import PackedDataset
from llama_fast.training.checkpointing import activation_checkpointing
from llama_fast.training.config import RowsOfSteps, TrainConfig
from llama_fast.training.evaluation import evaluate
from llama_fast.training.state import STATE_FILE, History
from llama_fast.training.weights import Weights

from .small_training import (
    CONFIG,
    bits,
    counting_data,
    masked_data,
    new_model,
    one_thread,  # noqa: F401  a fixture
    quick,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::llama_fast.errors.FallbackWarning"),
]


# --- data in memory -------------------------------------------------------------------------


def test_documents_are_packed_without_loss_or_padding():
    tokenizer = Tokenizer([bytes([byte]) for byte in BYTE_ORDER])
    texts = ["abc", "", "你好"]
    data = PackedDataset.from_texts(texts, tokenizer, block=4)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    expected = []
    for text in texts:
        expected += [bos, *tokenizer.encode(text), eos]
    assert data.tokens.tolist() == expected  # 5 + 2 + 8 tokens
    assert data.n_bytes == 9
    assert len(data) == (len(expected) - 1) // 4 == 3
    inputs, targets = data.rows(range(3))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [expected[i : i + 4] for i in (0, 4, 8)]
    assert targets.tolist() == [expected[i : i + 4] for i in (1, 5, 9)]
    batch = data.batch([2, 0])
    assert batch.tokens.tolist() == [expected[8:12] + expected[0:4]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8] and batch.kept == 8 and batch.longest == 4


def test_encoding_stops_when_there_are_enough_tokens():
    tokenizer = Tokenizer([bytes([byte]) for byte in BYTE_ORDER])
    data = PackedDataset.from_texts(itertools.repeat("ab"), tokenizer, block=2, n_tokens=10)
    assert len(data.tokens) == 12  # three documents of 4


def test_too_little_data_is_refused():
    with pytest.raises(LlamaFastError, match=r"at least 17 tokens"):
        PackedDataset(torch.arange(16), block=16)
    with pytest.raises(LlamaFastError, match="block is 0"):
        PackedDataset(torch.arange(16), block=0)


@pytest.mark.parametrize(("epochs", "size", "at_once"), [(2.0, 5, 2), (1.0, 4, None), (0.5, 3, 1)])
def test_every_epoch_takes_each_row_once_in_an_order_of_its_own(epochs, size, at_once):
    data = counting_data(16 * 12 + 1)
    config = TrainConfig(epochs=epochs, batch_size=size, micro_batch_size=at_once, seed=1)
    steps = list(RowsOfSteps(data, config))
    assert len(steps) == config.steps_of(12) == math.ceil(epochs * 12 / size)
    assert all(len(rows) <= (at_once or size) for step in steps for rows in step)
    taken = [row for step in steps for rows in step for row in rows]
    assert len(taken) == epochs * 12
    passes = [taken[i : i + 12] for i in range(0, len(taken), 12)]
    assert all(len(set(rows)) == len(rows) for rows in passes)
    assert len(passes) < 2 or passes[0] != passes[1]
    assert RowsOfSteps(data, config).of(len(steps) - 1) == steps[-1]


# --- the loop -------------------------------------------------------------------------------


def test_training_learns():
    model, data = new_model(), counting_data()
    before = evaluate(model, data)
    assert before.loss == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    samples = iter("ab")
    history = quick(
        model,
        data,
        TrainConfig(steps=60, learning_rate=1e-2, warmup_steps=5, eval_every=30),
        held_out=data,
        sample=lambda: next(samples),
    )
    assert [record["step"] for record in history.held_out] == [0, 30, 60]
    assert history.held_out[0]["loss"] == pytest.approx(before.loss)
    assert [record["step"] for record in history.train] == list(range(1, 61))
    assert history.tokens == history.kept == 60 * 4 * 16 and len(history.seconds) == 60
    assert history.held_out[-1]["loss"] < 0.2
    after = evaluate(model, data)
    assert history.held_out[-1]["loss"] == pytest.approx(after.loss)
    assert next(samples, None) is None


def test_evaluate_is_the_mean_over_all_targets_and_keeps_the_mode():
    model, data = new_model().train(), masked_data()
    rows = range(len(data))
    batch = data.batch(rows)
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens).double()
    expected = torch.nn.functional.cross_entropy(logits[0], batch.targets[0])
    judged = evaluate(model, data, batch_size=2)
    assert judged.loss == pytest.approx(expected.item(), rel=1e-5)
    assert judged.tokens == batch.kept < batch.tokens.numel()
    assert judged.perplexity == pytest.approx(math.exp(judged.loss))
    parts = sum(data.batch([r]).n_bytes for r in rows)
    nats = judged.loss * judged.tokens
    assert judged.bits_per_byte == pytest.approx(nats / math.log(2) / parts, rel=0.02)
    assert model.training
    data.n_bytes = 0
    assert evaluate(model, data).bits_per_byte is None


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_accumulation_is_one_large_batch(at_once):
    """Where the rows have different numbers of targets."""
    found = []
    for micro_batch_size in (None, at_once):
        model = new_model()
        config = TrainConfig(steps=3, batch_size=5, micro_batch_size=micro_batch_size)
        history = quick(model, masked_data(), config)
        found.append((history, bits(model)))
    (one, whole), (other, cut) = found
    for left, right in zip(one.train, other.train, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
        assert left["kept"] == right["kept"] < left["tokens"]
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_gives_the_same_bits_and_keeps_less(dtype, kind):
    found, kept = [], []

    def pack(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for checkpointing in (False, True):
        model = new_model(dtype)
        adapter = lora(model, 4, dropout=0.5) if kind == "lora" else None
        kept.append(0)
        config = TrainConfig(steps=3, checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            history = quick(model, counting_data(), config, adapter=adapter)
        assert not any("forward" in vars(layer) for layer in model.layers)
        found.append((history.train, bits(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert kept[1] < kept[0] / 2


def test_checkpointing_computes_attention_once():
    class Count(TorchDispatchMode):
        seen: ClassVar = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.seen[function] += 1
            return function(*args, **(kwargs or {}))

    model = new_model()
    batch = counting_data().batch([0])
    with activation_checkpointing(model):
        loss = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    with Count():  # of the backward pass
        loss.backward()
    assert Count.seen[torch.ops.llama_fast.rms_norm.default] > 0
    assert Count.seen[torch.ops.llama_fast.attention.default] == 0


def test_bfloat16_takes_updates_smaller_than_its_rounding():
    """A weight of 0.02 moves by 1e-5 a step, a fifth of its rounding."""
    start = torch.nn.Parameter(torch.full((8, 8), 0.02, dtype=torch.bfloat16))
    config = TrainConfig(learning_rate=1e-5, weight_decay=0.0)
    weights = Weights({"w": start}, config)
    for _ in range(40):
        start.grad = torch.ones_like(start)
        weights.take_gradients()
        weights.step()
    assert start.detach().float().mean().item() == pytest.approx(0.02 - 40e-5, rel=5e-3)
    assert start.grad is None


def test_gradients_of_half_weights_add_up_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weights = Weights({"w": weight}, TrainConfig())
    for value in (256.0, *[1.0] * 64):
        weight.grad = torch.tensor([value], dtype=torch.bfloat16)
        weights.take_gradients()
    assert weights.masters["w"].grad.item() == 320


def test_learning_rates_rise_then_fall():
    config = TrainConfig(learning_rate=2.0, final_fraction=0.1, warmup_steps=10)
    scales = {step: config.scale_at(step, 110) for step in (0, 9, 10, 60, 110)}
    assert scales == pytest.approx({0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1})
    linear = dataclasses.replace(config, schedule="linear")
    assert linear.scale_at(35, 110) == pytest.approx(0.775)
    assert dataclasses.replace(config, schedule="constant").scale_at(99, 110) == 1.0
    short = TrainConfig(warmup_steps=None)
    assert short.scale_at(0, 100) == pytest.approx(1 / 3) and short.scale_at(3, 100) == 1.0


def test_only_matrices_decay_and_embeddings_have_a_rate_of_their_own():
    model = new_model()
    config = TrainConfig(weight_decay=0.3, embedding_learning_rate=1e-5)
    weights = Weights(dict(model.named_parameters()), config)
    groups = weights.optimizer.param_groups
    seen = {}
    for group in groups:
        for weight in group["params"]:
            seen[id(weight)] = group["weight_decay"], group["lr"]
    for name, weight in model.named_parameters():
        rate = 1e-5 if name == "embed.weight" else 1e-3
        assert seen[id(weight)] == (0.3 if weight.ndim == 2 else 0.0, rate), name
    assert len(seen) == len(list(model.parameters()))
    weights.set_rate(0.5)
    assert {group["lr"] for group in groups} == {5e-6, 5e-4}


def test_gradients_are_clipped():
    seen = []

    def measure(optimizer, args, kwargs):
        grads = [w.grad for group in optimizer.param_groups for w in group["params"]]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item()
        seen.append(norm * kwargs["grad_scale"])

    handle = register_optimizer_step_pre_hook(measure)
    try:
        history = quick(new_model(), counting_data(), TrainConfig(steps=2, grad_clip=1e-3))
    finally:
        handle.remove()
    assert all(record["grad_norm"] > 0.1 for record in history.train)  # as they were before
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_the_backward_pass_are_those_after_it(dtype):
    found = []
    for in_backward in (False, True):
        model = new_model(dtype)
        config = TrainConfig(
            steps=4, grad_clip=None, half_weights="stochastic", step_in_backward=in_backward
        )
        history = quick(model, counting_data(), config)
        assert all(w.grad is None and not w._post_accumulate_grad_hooks for w in model.parameters())
        found.append((history, bits(model)))
    (after, expected), (within, given) = found
    assert [r["loss"] for r in after.train] == [r["loss"] for r in within.train]
    assert all(torch.equal(given[name], expected[name]) for name in given)
    assert within.train[0]["grad_norm"] is None


@pytest.mark.parametrize("half_weights", ["masters", "stochastic"])
def test_moments_of_eight_bits_learn_as_well(half_weights):
    model, data = new_model(torch.bfloat16), counting_data()
    config = TrainConfig(
        steps=25, learning_rate=1e-2, warmup_steps=2, moments="int8", half_weights=half_weights
    )
    history = quick(model, data, config)
    weights = Weights(dict(model.named_parameters()), config)
    assert bool(weights.masters) == (half_weights == "masters")
    assert history.train[-1]["loss"] < 0.6 * history.train[0]["loss"]


def test_an_adapter_alone_is_trained_and_learns():
    model, data = new_model(), counting_data()
    before = bits(model)
    adapter = lora(model, 8, rows=range(64))
    frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    history = quick(model, data, TrainConfig(steps=25, learning_rate=3e-2), adapter=adapter)
    assert history.train[-1]["loss"] < 0.8 * history.train[0]["loss"]
    for name, weight in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], weight), name
    adapter.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- how it ends ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = new_model()
    quick(model, counting_data(), TrainConfig(steps=2), folder=tmp_path)
    state = (tmp_path / STATE_FILE).read_bytes()
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(LlamaFastError, match=r"step 1: the loss is nan.*lower the learning rate"):
        quick(model, counting_data(), TrainConfig(steps=3), folder=tmp_path / "other")
    assert (tmp_path / STATE_FILE).read_bytes() == state
    assert all(weight.grad is None for weight in model.parameters())


def test_data_without_rows_or_targets_is_refused():
    class Empty(PackedDataset):
        def __len__(self):
            return 0

    class Unlabelled(PackedDataset):
        def batch(self, indices):
            batch = super().batch(indices)
            return batch._replace(targets=batch.targets * 0 - 100, kept=0)

    data = counting_data()
    with pytest.raises(LlamaFastError, match="training data has no rows"):
        quick(new_model(), Empty(data.tokens, 16), TrainConfig(steps=1))
    with pytest.raises(LlamaFastError, match="held-out data has no rows"):
        quick(new_model(), data, TrainConfig(steps=1), held_out=Empty(data.tokens, 16))
    with pytest.raises(LlamaFastError, match=r"step 1: no token of its rows is a target"):
        quick(new_model(), Unlabelled(data.tokens, 16), TrainConfig(steps=1))
    with pytest.raises(LlamaFastError, match="no token of the held-out data is a target"):
        evaluate(new_model(), Unlabelled(data.tokens, 16))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("learning_rate", -1.0), ("grad_clip", 0),
        ("epochs", float("inf")), ("weight_decay", -0.1), ("schedule", "cosin"),
        ("moments", "int4"), ("half_weights", "none"), ("micro_batch_size", 0),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        TrainConfig(**{field: value})


def test_what_excludes_each_other_is_refused():
    with pytest.raises(ConfigError, match="grad_clip=None"):
        TrainConfig(step_in_backward=True)
    with pytest.raises(ConfigError, match="micro_batch_size out"):
        TrainConfig(step_in_backward=True, grad_clip=None, batch_size=2, micro_batch_size=1)
    model = new_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is to be trained"):
        quick(model, counting_data(), TrainConfig(steps=1))
    adapter = lora(model)
    adapter.disable()
    with pytest.raises(ConfigError, match="is disabled"):
        quick(model, counting_data(), TrainConfig(steps=1), adapter=adapter)
    with pytest.raises(ConfigError, match=r"is float16.*bfloat16"):
        quick(new_model(torch.float16), counting_data(), TrainConfig(steps=1))


# --- the loss curve -------------------------------------------------------------------------


def test_the_loss_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
    from llama_fast.training.plot import plot_loss

    history = quick(new_model(), counting_data(), TrainConfig(steps=3), held_out=counting_data())
    plot_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    from llama_fast.training.plot import plot_loss

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LlamaFastError, match="pip install matplotlib"):
        plot_loss(History(), tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
