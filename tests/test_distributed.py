"""Two processes train as one: the same losses and weights, states that either goes on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from llama_fast.cli import main
from llama_fast.distributed import fully_shard, fully_sharded, is_fully_sharded
from llama_fast.errors import ConfigError
from llama_fast.model import Llama
from llama_fast.training.evaluation import evaluate

from .small_training import bits, counting_data, new_model, one_thread  # noqa: F401  a fixture
from .test_finetune import QUICK, tiny  # noqa: F401  fixtures
from .test_optim_sharded import numbers
from .training_rows import write
from .two_processes import KINDS, SMALL, preferring, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::llama_fast.errors.FallbackWarning"),
]
ROOT = Path(__file__).parent.parent


class Done(NamedTuple):
    """What two processes left in a folder, and how they ended."""

    folder: Path
    code: int
    stderr: str
    asked: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny) -> Done:  # noqa: F811
    folder = tmp_path_factory.mktemp("two")
    rows = [{"text": f"The {i}th of them says what the {i + 1}th has said. " * 3} for i in range(9)]
    texts = write(folder, "texts.jsonl", rows)
    asked = ["finetune", str(tiny), str(texts), *map(str, QUICK)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "tests.two_processes", folder, *asked]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (folder / "said.txt").exists(), ended.stderr[-3000:]
    return Done(folder, ended.returncode, ended.stderr, asked)


def close(found: dict, model, history, within: float, steps: int = 8) -> None:
    assert len(found["history"]["train"]) == len(history.train) == steps
    for kind in ("train", "held_out"):
        for one, other in zip(found["history"][kind], getattr(history, kind), strict=True):
            assert one == pytest.approx(other, rel=within, abs=within)
    for name, weight in bits(model).items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=within, atol=within, msg=name
        )


# A bfloat16 weight that is rounded the other way is off by 1/256 of itself.
WITHIN = {"sharded wide": 5e-6, "bfloat16": 2e-2, "sharded bfloat16": 2e-2, "sharded 8 bits": 4e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(done, kind):
    one, other = (torch.load(done.folder / f"{kind}-{rank}.pt") for rank in (0, 1))
    close(one, *trained(kind), within=WITHIN.get(kind, 1e-6))
    assert one["history"]["train"] == other["history"]["train"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


def test_two_processes_prefer_as_one(done, tmp_path):
    assert "returned a view" not in done.stderr  # of which FSDP2 warns
    close(torch.load(done.folder / "preferring-1.pt"), *preferring(tmp_path), 1e-5, steps=3)


RESUMED = ["full", "sharded", "sharded 8 bits"]


@pytest.mark.parametrize("kind", RESUMED)
def test_a_state_of_two_goes_on_in_one_and_again_in_two(done, kind):
    """Steps 1 to 3 in two processes, 4 and 5 in one, the others in two."""
    found = torch.load(done.folder / f"{kind} resumed-0.pt")
    close(found, *trained(kind), within=WITHIN.get(kind, 1e-6))
    assert len((done.folder / f"{kind} run" / "log.csv").read_text().splitlines()) == 1 + 8


@pytest.mark.parametrize("kind", RESUMED)
def test_a_state_is_taken_over_to_the_bit_by_any_number(done, kind):
    """Of 8-bit moments some become float32 in parts, and stay so: the same numbers."""
    times = torch.load(done.folder / f"{kind} taken over.pt")
    assert len(times) == 4  # saved by two and by one, each taken over by two and by one
    eight_bits = []
    for before, after in times:
        for part in ("identity", "step", "history"):
            assert before[part] == after[part]
        for part in ("weights", "masters"):
            saved, again = before[part], after[part]
            assert saved.keys() == again.keys()
            assert all(torch.equal(again[name], x) for name, x in saved.items())
        saved, again = before["optimizer"], after["optimizer"]
        assert saved["param_groups"] == again["param_groups"]
        for index, state in saved["state"].items():
            assert again["state"][index]["step"] == state["step"]
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(numbers(again["state"][index], name), numbers(state, name))
        eight_bits.append(sum("exp_avg_scale" in s for s in again["state"].values()))
    assert all(eight_bits) == (kind == "sharded 8 bits")


def test_a_process_holds_a_part_of_everything(done):
    for rank in (0, 1):
        held = torch.load(done.folder / f"held-{rank}.pt")
        for name, elements in held["bfloat16"].items():
            assert held["sharded bfloat16"][name] == elements / 2


def test_a_process_holds_a_part_of_what_a_lora_is_trained_beside(done):
    for kind, frozen in (("lora", 0), ("sharded lora", SMALL.n_params)):
        elements = torch.load(done.folder / f"{kind}-1.pt")["elements"]
        whole, own = map(sum, zip(*elements, strict=True))
        assert own == whole - frozen / 2 and whole > SMALL.n_params


def test_a_model_is_read_in_parts_and_saved_as_a_whole(done, tiny):  # noqa: F811
    model = Llama.from_pretrained(tiny, device="cpu")
    judged = evaluate(model, counting_data(500)).loss
    saved = Llama.from_pretrained(done.folder / "saved", device="cpu")
    for rank in (0, 1):
        weights, loss, said = torch.load(done.folder / f"loaded-{rank}.pt")
        assert loss == pytest.approx(judged, rel=1e-6)
        for name, weight in bits(model).items():
            assert torch.equal(weights[name], weight) and torch.equal(bits(saved)[name], weight)
        for text, expected in zip(said, REFUSED, strict=True):
            assert expected in text


def test_alone_a_model_stays_whole(tiny):  # noqa: F811
    model = fully_shard(Llama.from_pretrained(tiny, device="cpu", fully_sharded=True))
    assert not is_fully_sharded(model) and evaluate(model, counting_data(100)).tokens == 96


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.setattr(fully_sharded, "_NEEDED", ("fully_shard", "what_it_does_not_have"))
    with pytest.raises(ConfigError, match="install a newer torch"):
        fully_sharded.shard(new_model())


REFUSED = (
    "fully sharded already",
    "without quantize and without an adapter",
    "leave mesh and quantize out",
    "leave it out where there are several",
    *["leave dora and modules_to_save out"] * 2,
    "no process has the weights",
    "put on it afterwards",
)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_command_under_torchrun(done, kind):
    said = "processes      2, each with its part of every step and of the weights (fully sharded)\n"
    assert done.stderr.count(said) == 2
    assert done.stderr.count("a LoRA of") == 1
    more = ["--full", "--held-out", "0.3", "--sample", "The"] if kind == "full" else []
    alone, both = done.folder / f"{kind} alone", done.folder / KIND_FOLDERS[kind]
    assert main([*done.asked, *more, "--out", str(alone)]) == 0
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (both, alone))
    for name in ("steps", "tokens", "tokens_trained", "loss_first", "loss_last_tenth"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert len(one["held_out"]) == len(other["held_out"])
    file = "adapter/adapter_model.safetensors" if kind == "lora" else "model/model.safetensors"
    found, expected = load_file(both / file), load_file(alone / file)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    assert {path.name for path in both.iterdir()} == {path.name for path in alone.iterdir()}


KIND_FOLDERS = {"lora": "command", "full": "full command"}


def test_a_process_that_ends_ends_the_others(done):
    assert done.code != 0
    lines = (done.folder / "said.txt").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        seconds, said = line.split(" ", 1)
        assert said.startswith("process 0: another process of this training has ended")
        assert float(seconds) < 60
