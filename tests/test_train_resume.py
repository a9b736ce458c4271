"""A training that is interrupted, killed or short of room goes on to the same bits."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from llama_fast.checkpoint.writers import PthWriter
from llama_fast.errors import CheckpointError
from llama_fast.model import Llama
from llama_fast.training.adapter import lora
from llama_fast.training.blocks import PackedDataset
from llama_fast.training.config import TrainConfig
from llama_fast.training.record import CSV_FILE, TENSORBOARD
from llama_fast.training.state import STATE_FILE, History

from .small_training import (
    assert_same_bits,
    bits,
    counting_data,
    new_model,
    one_thread,  # noqa: F401  a fixture
    quick,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::llama_fast.errors.FallbackWarning"),
]

SAVING = TrainConfig(
    steps=12, warmup_steps=3, save_every=4, eval_every=5, batch_size=4, micro_batch_size=2
)


class Stopped(PackedDataset):
    """Data whose reader is interrupted when it is asked for the given batch."""

    stop_at, asked = 0, 0

    def batch(self, indices):
        self.asked += 1
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        return super().batch(indices)


def trained(kind: str, data, **more) -> tuple[Llama, History]:
    model = new_model(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    adapter = lora(model, 4, dropout=0.3) if kind == "lora" else None
    return model, quick(model, data, SAVING, held_out=counting_data(), adapter=adapter, **more)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("full", "in a step"),
        ("bfloat16", "while saving"),
        ("lora", "in a step"),
        ("lora", "before the first state"),
    ],
)
def test_resuming_gives_the_same_bits(tmp_path, kind, where, monkeypatch):
    expected, whole = trained(kind, counting_data())
    stopped = Stopped(counting_data().tokens, 16)
    with monkeypatch.context() as patched:
        if where == "while saving":
            failing_at_second(patched, "put", KeyboardInterrupt())
        else:  # two micro-batches a step
            stopped.stop_at = 14 if where == "in a step" else 6
        with pytest.raises(KeyboardInterrupt):
            trained(kind, stopped, folder=tmp_path)
    there = {path.name for path in tmp_path.iterdir()} - {TENSORBOARD}
    assert there == {CSV_FILE} | ({STATE_FILE} if where != "before the first state" else set())

    torch.manual_seed(99)
    resumed, history = trained(kind, counting_data(), folder=tmp_path)
    assert history.train == whole.train
    assert history.held_out == whole.held_out
    assert_same_bits(expected, resumed)
    assert resumed.head.weight is resumed.embed.weight
    with open(tmp_path / CSV_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [record["loss"] for record in whole.train]
    assert [row["step"] for row in rows if row["held_out_loss"]] == ["5", "10", "12"]


def failing_at_second(patched, method: str, error: BaseException) -> None:
    """The second state that is written fails, at the first call of a method of its writer."""
    files = []

    class Writer(PthWriter):
        def __init__(self, path):
            super().__init__(path)
            files.append(path)
            self.number = len(files)

        def put(self, tensor):
            found = super().put(tensor)
            self.fail("put")
            return found

        def close(self, content=None):
            self.fail("close")
            super().close(content)

        def fail(self, name):
            if self.number == 2 and name == method:
                raise error

    patched.setattr("llama_fast.training.state.PthWriter", Writer)


KILLED = """
    import sys, torch
    from tests.test_train_resume import SAVING, counting_data, trained
    torch.set_num_threads(1)
    class Slow(type(counting_data())):
        asked = 0
        def batch(self, indices):
            Slow.asked += 1
            if Slow.asked == 15:
                print("half of step 8", flush=True)
                sys.stdin.read()  # until it is killed
            return super().batch(indices)
    trained("lora", Slow(counting_data().tokens, 16), folder=sys.argv[1])
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"half of step 8\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    expected, whole = trained("lora", counting_data())
    resumed, history = trained("lora", counting_data(), folder=tmp_path)
    assert history.train == whole.train and history.held_out == whole.held_out
    assert_same_bits(expected, resumed)


def test_training_leaves_the_generators_of_the_caller_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trained("lora", counting_data())
    torch.manual_seed(7)
    model = new_model()
    adapter = lora(model, dropout=0.5)
    torch.manual_seed(7)
    quick(model, counting_data(), TrainConfig(steps=2), adapter=adapter)
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_training_is_not_repeated(tmp_path):
    data, model = counting_data(), new_model()
    first = quick(model, data, SAVING, folder=tmp_path)
    again_model = new_model()
    again = quick(again_model, data, SAVING, folder=tmp_path)
    assert again == first
    assert_same_bits(model, again_model)


def test_the_state_of_another_training_is_refused(tmp_path):
    quick(new_model(), counting_data(), SAVING, folder=tmp_path)
    other = dataclasses.replace(SAVING, learning_rate=0.5)
    model = new_model()
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"learning_rate=0.001, not 0.5"):
        quick(model, counting_data(), other, folder=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    with pytest.raises(CheckpointError, match="other data"):
        quick(new_model(), counting_data(601), SAVING, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"dtype='torch.float32', not 'torch.bfloat16'"):
        quick(new_model(torch.bfloat16), counting_data(), SAVING, folder=tmp_path)
    model = new_model()
    with pytest.raises(CheckpointError, match="other adapter"):
        quick(model, counting_data(), SAVING, folder=tmp_path, adapter=lora(model))
    more_often = dataclasses.replace(SAVING, save_every=1)
    quick(new_model(), counting_data(), more_often, folder=tmp_path)


def test_a_damaged_state_is_refused(tmp_path):
    quick(new_model(), counting_data(), SAVING, folder=tmp_path)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"training\.pt is no complete state.*remove it"):
        quick(new_model(), counting_data(), SAVING, folder=tmp_path)


@pytest.mark.parametrize("method", ["put", "close"])
def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch, method):
    with monkeypatch.context() as patched:
        failing_at_second(patched, method, OSError(28, "No space left on device"))
        with pytest.raises(
            CheckpointError, match=r"(?s)step 8 could not be written.*step 4 is still there"
        ):
            quick(new_model(), counting_data(), SAVING, folder=tmp_path)
    assert not list(tmp_path.glob(".*"))
    expected, model = new_model(), new_model()
    quick(expected, counting_data(), SAVING)
    quick(model, counting_data(), SAVING, folder=tmp_path)
    assert_same_bits(expected, model)


def test_an_interrupted_training_takes_no_time_to_begin_again(tmp_path):
    """It starts at the saved step, it does not pass over the steps before."""
    quick(new_model(), counting_data(), SAVING, folder=tmp_path)
    data = Stopped(counting_data().tokens, 16)
    start = time.perf_counter()
    quick(new_model(), data, SAVING, folder=tmp_path)
    assert data.asked == 0 and time.perf_counter() - start < 5
