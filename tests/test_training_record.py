"""What a training writes while it runs: TensorBoard's curves, by a stand-in and by the package."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from llama_fast.training.config import TrainConfig
from llama_fast.training.record import TENSORBOARD

from .small_training import (  # noqa: F401  a fixture
    counting_data,
    interrupting,
    new_model,
    one_thread,
    quick,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(steps=4, batch_size=2, eval_every=2, save_every=1)
NAMES = {"epoch", "loss", "learning_rate", "grad_norm", "tokens", "kept"}
JUDGED = {"loss", "perplexity", "bits_per_byte"}


def train(folder, config: TrainConfig = CONFIG):
    held_out = counting_data(100)
    return quick(new_model(), counting_data(), config, held_out=held_out, folder=folder)


class Writer:
    """What torch's SummaryWriter does for us, kept."""

    made: list[Writer]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed and isinstance(value, int | float)
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch) -> list[Writer]:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    monkeypatch.setattr(Writer, "made", [], raising=False)
    return Writer.made


def test_every_step_and_every_evaluation_are_written(tmp_path, writers):
    history = train(tmp_path)
    (writer,) = writers
    assert writer.closed and writer.folder == str(tmp_path / TENSORBOARD)
    assert writer.purge_step == 1
    expected = {(f"train/{name}", record[name], record["step"])
                for record in history.train for name in NAMES}  # fmt: skip
    expected |= {(f"held_out/{name}", record[name], record["step"])
                 for record in history.held_out[1:] for name in JUDGED}  # fmt: skip
    assert [record["step"] for record in history.held_out] == [0, 2, 4]
    assert set(writer.scalars) == expected and len(writer.scalars) == len(expected)


def test_a_training_that_goes_on_replaces_the_steps_that_it_takes_once_more(
    tmp_path, writers, monkeypatch
):
    config = TrainConfig(steps=4, batch_size=2, save_every=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llama_fast.training.weights.Weights.step", interrupting(3))
        train(tmp_path, config)
    train(tmp_path, config)
    first, second = writers
    assert first.closed and {step for *_, step in first.scalars} == {1, 2, 3}
    assert second.purge_step == 3 and {step for *_, step in second.scalars} == {3, 4}


def test_what_is_not_known_is_left_out(tmp_path, writers):
    config = TrainConfig(steps=2, batch_size=2, step_in_backward=True, grad_clip=None)
    train(tmp_path, config)
    assert {name for name, *_ in writers[0].scalars} == {
        *(f"train/{name}" for name in NAMES - {"grad_norm"}),
        *(f"held_out/{name}" for name in JUDGED),
    }


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    train(tmp_path)
    assert not (tmp_path / TENSORBOARD).exists() and (tmp_path / "log.csv").is_file()


def test_the_package_reads_back_what_was_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llama_fast.training.weights.Weights.step", interrupting(3))
        train(tmp_path, TrainConfig(steps=4, batch_size=2, eval_every=2, save_every=2))
    history = train(tmp_path, TrainConfig(steps=4, batch_size=2, eval_every=2, save_every=2))
    found = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert set(found.Tags()["scalars"]) == {
        *(f"train/{name}" for name in NAMES),
        *(f"held_out/{name}" for name in JUDGED),
    }
    for name, records in (("train", history.train), ("held_out", history.held_out)):
        events = found.Scalars(f"{name}/loss")
        assert [event.step for event in events] == [record["step"] for record in records]
        assert [event.value for event in events] == pytest.approx([r["loss"] for r in records])
