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

from llama_fast.cli import main

from .small_training import bits, one_thread  # noqa: F401  a fixture
from .test_finetune import QUICK, tiny  # noqa: F401  fixtures
from .training_rows import write
from .two_processes import KINDS, trained

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
    asked = ["finetune", str(tiny), str(texts), *map(str, QUICK), "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "tests.two_processes", folder, *asked, folder / "command"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (folder / "said.txt").exists(), ended.stderr[-3000:]
    return Done(folder, ended.returncode, ended.stderr, asked)


def close(found: dict, model, history, within: float) -> None:
    assert len(found["history"]["train"]) == len(history.train) == 8
    for kind in ("train", "held_out"):
        for one, other in zip(found["history"][kind], getattr(history, kind), strict=True):
            assert one == pytest.approx(other, rel=within, abs=within)
    for name, weight in bits(model).items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=within, atol=within, msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(done, kind):
    one, other = (torch.load(done.folder / f"{kind}-{rank}.pt") for rank in (0, 1))
    # A bfloat16 weight that is rounded the other way is off by 1/256 of itself.
    close(one, *trained(kind), within=2e-2 if kind == "bfloat16" else 1e-6)
    assert one["history"]["train"] == other["history"]["train"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


def test_a_state_of_two_goes_on_in_one_and_again_in_two(done):
    """Steps 1 to 3 in two processes, 4 and 5 in one, the others in two."""
    close(torch.load(done.folder / "resumed-0.pt"), *trained("full"), within=1e-6)
    assert len((done.folder / "run" / "log.csv").read_text().splitlines()) == 1 + 8


def test_the_command_under_torchrun(done):
    assert "processes      2, each with its part" in done.stderr
    assert done.stderr.count("a LoRA of") == 1
    assert main([*done.asked, str(done.folder / "alone")]) == 0
    one, other = (
        json.loads((done.folder / name / "metrics.json").read_text())
        for name in ("command", "alone")
    )
    for name in ("steps", "tokens", "tokens_trained", "loss_first", "loss_last_tenth"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert (done.folder / "command" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_process_that_ends_ends_the_others(done):
    assert done.code != 0
    seconds, said = (done.folder / "said.txt").read_text().split(" ", 1)
    assert said.startswith("process 0: another process of this training has ended")
    assert float(seconds) < 60
