"""What tests/test_distributed.py runs in two processes, once: to begin them takes the most time.

torchrun --nproc-per-node 2 -m tests.two_processes FOLDER [the arguments of a command]
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llama_fast.cli import main
from llama_fast.distributed import Processes
from llama_fast.errors import ProcessError
from llama_fast.model import Llama
from llama_fast.training.adapter import lora
from llama_fast.training.config import TrainConfig
from llama_fast.training.state import History
from llama_fast.training.weights import Weights

from .small_training import bits, counting_data, interrupting, masked_data, new_model, quick

# Steps of five rows, in micro-batches of two: the parts of two processes differ in rows and in
# trained tokens, and the clip is at work. The last step has one row, so one process has none.
CONFIG = TrainConfig(
    epochs=36 / 37, batch_size=5, micro_batch_size=2, learning_rate=2e-3, warmup_steps=2,
    grad_clip=0.5, eval_every=3, save_every=1,
)  # fmt: skip
KINDS = ("lora", "full", "bfloat16")


def trained(kind: str, **more) -> tuple[Llama, History]:
    model = new_model(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    adapter = None
    if kind == "lora":
        torch.manual_seed(Processes().rank)  # the first process's values of A are everybody's
        adapter = lora(model, 4)
    data, held_out = masked_data(), counting_data(500)
    return model, quick(model, data, CONFIG, held_out=held_out, adapter=adapter, **more)


def stopped_at(step: int, **more) -> None:
    """A training of all weights that is interrupted before that update, counted from 0."""
    real, Weights.step = Weights.step, interrupting(step)
    try:
        trained("full", **more)
    except KeyboardInterrupt:
        return
    finally:
        Weights.step = real
    raise AssertionError("it was not interrupted")


def keep(folder: Path, name: str, found: tuple[Llama, History]) -> None:
    model, history = found
    content = {"weights": bits(model), "history": dataclasses.asdict(history)}
    torch.save(content, folder / f"{name}-{Processes().rank}.pt")


def die(folder: Path) -> None:
    """The second process ends in the middle of a step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: the first is to end by itself
    if Processes().rank == 1:
        Weights.step = lambda *_: os._exit(3)
    begun = time.perf_counter()
    try:
        trained("full")
    except ProcessError as error:
        (folder / "said.txt").write_text(f"{time.perf_counter() - begun} {error}")
        os._exit(4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # Processes are joined once in a launch: the command does it, and they stay so for what follows.
    dist.destroy_process_group = lambda: None
    assert main(sys.argv[2:]) == 0
    rank, joined = Processes().rank, dist.is_initialized
    assert Processes().size == 2
    for kind in KINDS:
        keep(folder, kind, trained(kind))
    stopped_at(3, folder=folder / "run")
    if rank == 0:  # as if alone, while the other one waits
        dist.is_initialized = lambda: False
        stopped_at(2, folder=folder / "run")
        dist.is_initialized = joined
    Processes().wait()
    keep(folder, "resumed", trained("full", folder=folder / "run"))
    die(folder)
