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
from llama_fast.distributed import Processes, fully_shard, is_fully_sharded
from llama_fast.distributed.fully_sharded import gathered
from llama_fast.errors import ConfigError, LlamaFastError, ProcessError
from llama_fast.model import Llama
from llama_fast.training.adapter import lora
from llama_fast.training.config import TrainConfig
from llama_fast.training.dpo import finetune_dpo
from llama_fast.training.evaluation import evaluate
from llama_fast.training.objective import NextToken
from llama_fast.training.pairs import read_pairs
from llama_fast.training.split import hold_out
from llama_fast.training.state import STATE_FILE, History, StateFile
from llama_fast.training.weights import Weights

from . import test_dpo
from .small_training import CONFIG as SMALL
from .small_training import bits, counting_data, interrupting, masked_data, new_model, quick
from .training_rows import write

# Steps of five rows, in micro-batches of two: the parts of two processes differ in rows and in
# trained tokens, and the clip is at work. The last step has one row, so one process has none.
CONFIG = TrainConfig(
    epochs=36 / 37, batch_size=5, micro_batch_size=2, learning_rate=2e-3, warmup_steps=2,
    grad_clip=0.5, eval_every=3, save_every=1,
)  # fmt: skip
# Rows of some weights are one block of 8-bit moments, of others not. Nothing is tied, and neither
# the vocabulary nor the hidden dim is a number of rows that two processes share evenly.
WIDE = dataclasses.replace(
    SMALL, dim=256, n_layers=1, head_dim=64, hidden_dim=99, tied=False, vocab_size=65
)
EIGHT_BITS = dataclasses.replace(
    CONFIG, moments="int8", half_weights="stochastic", checkpointing=True
)
# Each with the model, and how it is trained. Sharded are those of "sharded …".
KINDS = {
    "lora": (SMALL, torch.float32, CONFIG),
    "full": (SMALL, torch.float32, CONFIG),
    "bfloat16": (SMALL, torch.bfloat16, CONFIG),
    "sharded": (SMALL, torch.float32, CONFIG),
    "sharded bfloat16": (SMALL, torch.bfloat16, CONFIG),
    "sharded lora": (SMALL, torch.float32, CONFIG),
    "sharded wide": (WIDE, torch.float32, dataclasses.replace(CONFIG, checkpointing=True)),
    "sharded 8 bits": (WIDE, torch.bfloat16, EIGHT_BITS),
}


def new_model_of(kind: str) -> Llama:
    config, dtype, _ = KINDS[kind]
    model = new_model(dtype, config)
    if not kind.startswith("sharded") or Processes().size == 1:
        return model
    if Processes().rank == 1:
        model.reset_parameters()  # other values: the first process's are everybody's
    return fully_shard(model)


def trained(kind: str, **more) -> tuple[Llama, History]:
    model, adapter = new_model_of(kind), None
    if kind.endswith("lora"):
        torch.manual_seed(Processes().rank)  # the first process's values of A are everybody's
        adapter = lora(model, 4, rows=[3, 5] if kind.startswith("sharded") else None)
    data, held_out = masked_data(), counting_data(500)
    config = KINDS[kind][2]
    return model, quick(model, data, config, held_out=held_out, adapter=adapter, **more)


def preferring(folder: Path) -> tuple[Llama, History]:
    """DPO of all weights: rows of several pairs, of which the last process has the fewest."""
    path = write(folder, f"pairs {Processes().rank}.jsonl", test_dpo.ROWS)
    data = read_pairs(path, test_dpo.TOKENIZER, block=24)
    rows, held_out = hold_out(data, 0.4, seed=1)
    config = TrainConfig(steps=3, batch_size=3, micro_batch_size=1, learning_rate=1e-3)
    model = fully_shard(test_dpo.new_model())
    settings = {"held_out": held_out, "folder": folder / "preferring", "progress": False}
    return model, finetune_dpo(model, rows, config, **settings)


def stopped_at(step: int, kind: str, **more) -> None:
    """A training that is interrupted before that update, counted from 0."""
    real, Weights.step = Weights.step, interrupting(step)
    try:
        trained(kind, **more)
    except KeyboardInterrupt:
        return
    finally:
        Weights.step = real
    raise AssertionError("it was not interrupted")


def resumed(kind: str, folder: Path) -> tuple[Llama, History]:
    """Steps 1 to 3 are taken by both, 4 and 5 by the first alone, the others by both."""
    stopped_at(3, kind, folder=folder)
    keep_what_is_taken_over(kind, folder)
    alone(lambda: stopped_at(2, kind, folder=folder))
    keep_what_is_taken_over(kind, folder)
    return trained(kind, folder=folder)


def alone(do) -> None:
    """The first process does something as if it were the only one, while the other waits."""
    if Processes().rank == 0:
        joined, dist.is_initialized = dist.is_initialized, lambda: False
        try:
            do()
        finally:
            dist.is_initialized = joined
    Processes().wait()


def keep_what_is_taken_over(kind: str, folder: Path) -> None:
    """The state in the folder, as it is saved again by whoever takes it over: by both processes,
    and by the first alone."""

    def taken_over(path: Path) -> None:
        model = new_model_of(kind)
        weights = Weights(dict(model.named_parameters()), KINDS[kind][2])
        saved = torch.load(folder / STATE_FILE)
        step, history = StateFile(folder, saved["identity"]).load(weights)
        (folder.parent / "again").mkdir(exist_ok=True)
        again = StateFile(folder.parent / "again", saved["identity"])
        again.save(step, history, weights, torch.device("cpu"))
        if Processes().main:
            found = [*(torch.load(path) if path.exists() else []), (saved, torch.load(again.path))]
            torch.save(found, path)

    path = folder.parent / f"{kind} taken over.pt"
    taken_over(path)
    alone(lambda: taken_over(path))


def keep(folder: Path, name: str, found: tuple[Llama, History]) -> None:
    model, history = found
    weights = {name: gathered(weight).clone() for name, weight in bits(model).items()}
    content = {"weights": weights, "history": dataclasses.asdict(history)}
    content["elements"] = [(weight.numel(), own(weight)) for weight in model.parameters()]
    torch.save(content, folder / f"{name}-{Processes().rank}.pt")


def keep_what_a_process_holds(folder: Path) -> None:
    """Elements of weights, copies, gradients and moments in a training of all weights."""
    found = {}
    for kind in ("bfloat16", "sharded bfloat16"):
        model = new_model_of(kind)
        weights = Weights(dict(model.named_parameters()), CONFIG)
        NextToken().loss(model, counting_data().batch([0, 1]))[0].backward()
        weights.take_gradients()
        gradients = sum(own(w.grad) for w in weights.updated if w.grad is not None)
        weights.step()
        states = weights.optimizer.state.values()
        found[kind] = {
            "weights": sum(map(own, weights.named.values())),
            "copies": sum(map(own, weights.masters.values())),
            "gradients": gradients,
            "moments": sum(
                own(state[name]) for state in states for name in state if name != "step"
            ),
        }
    torch.save(found, folder / f"held-{Processes().rank}.pt")


def own(x: torch.Tensor) -> int:
    return (x.to_local() if hasattr(x, "to_local") else x).numel()


def keep_what_is_loaded(folder: Path, model_folder: str) -> None:
    """A model that is read in parts, judged, saved again as a whole, and what is refused."""
    model = Llama.from_pretrained(model_folder, device="cpu", fully_sharded=True)
    assert is_fully_sharded(model) and model.head.weight is model.embed.weight
    weights = {name: gathered(weight).clone() for name, weight in bits(model).items()}
    judged = evaluate(model, counting_data(500)).loss
    model.save_pretrained(folder / "saved")
    said = []
    for refused in (
        lambda: fully_shard(model),
        lambda: fully_shard(Llama.from_pretrained(model_folder, device="cpu", quantize="int8")),
        lambda: Llama.from_pretrained(model_folder, quantize="int8", fully_sharded=True),
        lambda: quick(new_model(), counting_data(), in_backward()),
        lambda: lora(model, 4, dora=True),
        lambda: lora(model, 4, modules_to_save=["norm"]),
        lambda: lora(model, 4).merge(),
        lambda: fully_shard(new_model_with_lora()),
    ):
        try:
            refused()
        except ConfigError as error:
            said.append(str(error))
    torch.save((weights, judged, said), folder / f"loaded-{Processes().rank}.pt")


def new_model_with_lora() -> Llama:
    model = new_model()
    lora(model, 4)
    return model


def in_backward() -> TrainConfig:
    return TrainConfig(step_in_backward=True, grad_clip=None)


def die(folder: Path) -> None:
    """The second process ends in the middle of a pass. The first one notices it while it gathers
    weights, and would notice it in any other exchange."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: the first is to end by itself
    real, calls = NextToken.loss, []

    def loss(*args):
        calls.append(1)
        if Processes().rank == 1 and len(calls) == 2:
            os._exit(3)
        return real(*args)

    NextToken.loss = loss
    begun, said = time.perf_counter(), []
    for kind in ("sharded", "full"):
        try:
            trained(kind)
        except ProcessError as error:
            said.append(f"{time.perf_counter() - begun} {error}")
        except LlamaFastError as error:
            said.append(f"another error: {error}")
    (folder / "said.txt").write_text("\n".join(said))
    os._exit(4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # Processes are joined once in a launch: the command does it, and they stay so for what follows.
    dist.destroy_process_group = lambda: None
    command = sys.argv[2:]
    assert main([*command, "--sharded", "--out", str(folder / "command")]) == 0
    full = ["--full", "--held-out", "0.3", "--sample", "The"]
    assert main([*command, *full, "--out", str(folder / "full command")]) == 0
    assert Processes().size == 2
    for kind in KINDS:
        keep(folder, kind, trained(kind))
    for kind in ("full", "sharded", "sharded 8 bits"):
        keep(folder, f"{kind} resumed", resumed(kind, folder / f"{kind} run"))
    keep(folder, "preferring", preferring(folder))
    keep_what_a_process_holds(folder)
    keep_what_is_loaded(folder, sys.argv[3])
    die(folder)
