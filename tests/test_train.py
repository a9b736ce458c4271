"""Packing of documents, the training loop, its checkpoints and its loss curve."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointError, ConfigError, LlamaFastError
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.training.data import PackedDataset
from llama_fast.training.loop import (
    STATE_FILE,
    History,
    TrainConfig,
    evaluate,
    make_optimizer,
    train,
)
from llama_fast.training.plot import plot_loss

CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=64,
    vocab_size=64,
    max_seq_len=16,
    tied=True,
)


def new_model() -> Llama:
    torch.manual_seed(3)
    return Llama(CONFIG, dtype=torch.float32)


def counting_data(n_tokens: int = 600) -> PackedDataset:
    """Each token follows from the one before it, so the loss can reach 0."""
    return PackedDataset((torch.arange(n_tokens) * 7) % CONFIG.vocab_size, block=16)


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-identity is promised for equal numbers of threads; small shapes need one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- data -----------------------------------------------------------------------------------


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


def test_encoding_stops_when_there_are_enough_tokens():
    tokenizer = Tokenizer([bytes([byte]) for byte in BYTE_ORDER])

    def endless():
        while True:
            yield "ab"

    data = PackedDataset.from_texts(endless(), tokenizer, block=2, n_tokens=10)
    assert len(data.tokens) == 12  # three documents of 4


def test_an_epoch_takes_each_block_once_and_the_next_shuffles_anew():
    data = counting_data(16 * 12 + 1)
    epochs = []
    for epoch in range(2):
        rows = [data.batch(epoch * 4 + i, 3, seed=1)[0] for i in range(4)]
        starts = [tuple(row) for batch in rows for row in batch.tolist()]
        epochs.append(starts)
    every_block = sorted(tuple(row) for row in data.rows(range(12))[0].tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == every_block
    assert epochs[0] != epochs[1]
    assert torch.equal(data.batch(5, 3, seed=1)[0], data.batch(5, 3, seed=1)[0])
    assert not torch.equal(data.batch(0, 12, seed=1)[0], data.batch(0, 12, seed=2)[0])


def test_too_little_data_is_refused():
    with pytest.raises(LlamaFastError, match=r"at least 17 tokens"):
        PackedDataset(torch.arange(16), block=16)
    with pytest.raises(LlamaFastError, match="block is 0"):
        PackedDataset(torch.arange(16), block=0)
    with pytest.raises(LlamaFastError, match="fill no batch of 99"):
        counting_data().batch(0, 99, seed=0)


# --- the loop -------------------------------------------------------------------------------


def test_training_learns():
    model, data = new_model(), counting_data()
    before = evaluate(model, data)
    assert before == pytest.approx(math.log(CONFIG.vocab_size), rel=0.1)
    history = train(
        model,
        data,
        TrainConfig(steps=60, learning_rate=1e-2, warmup_steps=5, eval_every=30),
        held_out=data,
        progress=False,
    )
    assert [record["step"] for record in history.held_out] == [30, 60]
    assert [record["step"] for record in history.train] == list(range(1, 61))
    assert history.tokens == 60 * 4 * 16
    assert history.held_out[-1]["loss"] < 0.2
    assert history.held_out[-1]["loss"] == pytest.approx(evaluate(model, data))


def test_evaluate_is_the_mean_over_all_tokens_and_keeps_the_mode():
    model, data = new_model().train(), counting_data(16 * 5 + 1)
    inputs, targets = data.rows(range(5))
    logits = model(inputs).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert evaluate(model, data, batch_size=2) == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = TrainConfig(steps=110, learning_rate=2.0, final_fraction=0.1, warmup_steps=10)
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(9) == pytest.approx(2.0)
    assert config.learning_rate_at(10) == pytest.approx(2.0)
    assert config.learning_rate_at(60) == pytest.approx((2.0 + 0.2) / 2)
    assert config.learning_rate_at(110) == pytest.approx(0.2)


def test_only_matrices_decay_and_a_tied_head_once():
    model = new_model()
    optimizer = make_optimizer(model, TrainConfig(steps=1, weight_decay=0.3))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert all(w.ndim == 2 for w in decayed["params"]) and all(w.ndim == 1 for w in plain["params"])
    assert sum(w is model.embed.weight for w in decayed["params"]) == 1
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_gradients_are_clipped():
    model = new_model()
    seen = []

    def measure(optimizer, args, kwargs):
        grads = [w.grad for group in optimizer.param_groups for w in group["params"]]
        seen.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())

    handle = register_optimizer_step_pre_hook(measure)
    try:
        config = TrainConfig(steps=2, grad_clip=1e-3)
        history = train(model, counting_data(), config, progress=False)
    finally:
        handle.remove()
    assert all(record["grad_norm"] > 0.1 for record in history.train)  # as they were before
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_training():
    model = new_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(LlamaFastError, match=r"step 1: the loss is nan.*lower the learning rate"):
        train(model, counting_data(), TrainConfig(steps=3), progress=False)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", 0), ("learning_rate", -1.0), ("grad_clip", 0)]
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        TrainConfig(**{"steps": 1, field: value})


# --- checkpoint and resume ------------------------------------------------------------------

SAVING = TrainConfig(steps=12, warmup_steps=3, save_every=4, eval_every=5)


class Interrupted(PackedDataset):
    """A dataset whose reader is interrupted once, before the given step."""

    stop_before = 0

    def batch(self, step, batch_size, seed):
        if step == self.stop_before:
            raise KeyboardInterrupt
        return super().batch(step, batch_size, seed)


def test_resuming_gives_the_same_bits(tmp_path):
    data = counting_data()
    whole = new_model()
    expected = train(whole, data, SAVING, held_out=data, progress=False)

    broken = Interrupted(data.tokens, data.block)
    broken.stop_before = 7  # the last save is after step 4
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), broken, SAVING, held_out=data, folder=tmp_path, progress=False)
    torch.manual_seed(99)
    resumed = Llama(CONFIG, dtype=torch.float32)  # other weights: all must come from the file
    history = train(resumed, data, SAVING, held_out=data, folder=tmp_path, progress=False)

    assert history.train == expected.train
    assert history.held_out == expected.held_out
    assert history.tokens == expected.tokens
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert resumed.head.weight is resumed.embed.weight
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_finished_training_is_not_repeated(tmp_path):
    data, model = counting_data(), new_model()
    first = train(model, data, SAVING, folder=tmp_path, progress=False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    again = train(new_model(), data, SAVING, folder=tmp_path, progress=False)
    assert again.train == first.train
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_the_state_of_another_training_is_refused(tmp_path):
    train(new_model(), counting_data(), SAVING, folder=tmp_path, progress=False)
    other = TrainConfig(steps=12, warmup_steps=3, save_every=4, eval_every=5, learning_rate=0.5)
    with pytest.raises(CheckpointError, match=r"learning_rate=0.001, not 0.5"):
        train(new_model(), counting_data(), other, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="other data"):
        train(new_model(), counting_data(601), SAVING, folder=tmp_path, progress=False)


def test_a_damaged_state_is_refused(tmp_path):
    train(new_model(), counting_data(), SAVING, folder=tmp_path, progress=False)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"training\.pt is no complete state.*remove it"):
        train(new_model(), counting_data(), SAVING, folder=tmp_path, progress=False)


# --- the loss curve -------------------------------------------------------------------------


def test_the_loss_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
    history = train(
        new_model(), counting_data(), TrainConfig(steps=3), held_out=counting_data(), progress=False
    )
    plot_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(LlamaFastError, match="pip install matplotlib"):
        plot_loss(History(), tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
