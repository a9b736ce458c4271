"""A transformers model as it is, compiled, with Liger, and patched: prefill, decode, training.

    python -m benchmarks.bench_patch                       # Llama 3.2 1B's shape, random weights
    python -m benchmarks.bench_patch --layers 2 --rows training
    python -m benchmarks.bench_patch --baselines transformers llama_fast --rows decode

Each baseline lives in a process of its own, and they take turns; before that, what each computes
is compared with what transformers does. The rows go to the results file of this machine, for
`llama-fast report`: tokens per second, and the memory that a call holds at its peak beyond what was
held before, such as the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import PAUSE, missing, shape, with_layers
from benchmarks.worker import Worker, WorkerError, run_apart
from llama_fast.bench import machine, results, roofline
from llama_fast.bench.memory import extra_memory
from llama_fast.bench.results import OURS, Goal, Row
from llama_fast.bench.timing import OtherPrograms, interleaved
from llama_fast.errors import LlamaFastError
from llama_fast.utils.compare import relative_rms

TRANSFORMERS, COMPILED, LIGER = "transformers", "torch.compile", "liger-kernel"
BASELINES = (OURS, TRANSFORMERS, COMPILED, LIGER)
# Layers of the 1B shape that a row has, where --layers does not say.
ROWS = {"prefill": 16, "decode": 16, "training": 4}
WHAT = {"prefill": "prefill", "decode": "decode", "training": "training step"}
# What the patch must reach, in times as fast as each; and of the memory of transformers.
GOALS = {
    "cpu": {
        "prefill": {TRANSFORMERS: 1.15},
        "decode": {TRANSFORMERS: 2.5},
        "training": {TRANSFORMERS: 1.0},
    },
    "cuda": {"training": {COMPILED: 1.10, LIGER: 1.10}},
}
MEMORY = {"cuda": {"training": 0.5}}
# How far a baseline may be from transformers, both in bfloat16, in units of the size of what it
# computes: logits, and of a training step the gradient of the first norm. Unrelated: 1.4.
TOLERANCE = {"prefill": 0.1, "decode": 0.1, "training": 0.3}
# Calls before the clock: a compiled model compiles again when it has seen a second length.
WARM_UPS = 2


@dataclass(frozen=True)
class Options:
    """tokens  of a prompt or of each sequence of a training step; batch: sequences of that
    steps   tokens of a sample of decode
    backend  of our ops; None: each device's own order"""

    shape: str = "1b"
    layers: int | None = None
    batch: int = 1
    tokens: int = 128
    steps: int = 4
    rounds: int = 5
    threads: int = os.cpu_count() or 1
    device: str = "cpu"
    baselines: tuple[str, ...] = BASELINES
    backend: str | None = None

    def layers_of(self, row: str) -> int:
        return self.layers or ROWS[row]


class Baseline:
    """One way to run a model, in bfloat16, with the same random weights in every process."""

    def __init__(self, kind: str, options: Options, layers: int) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.options, self.device = options, options.device
        of = dataclasses.replace(shape(options.shape), n_layers=layers)
        config = transformers.LlamaConfig(**of.to_hf())
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.eval()
        if kind == OURS:
            import llama_fast

            if options.backend is not None:
                self.asked = ExitStack()  # for all that this process does
                self.asked.enter_context(llama_fast.use_backend(options.backend))
            llama_fast.patch(self.model, strict=True)
        elif kind == LIGER:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model)
        self.run = torch.compile(self.model) if kind == COMPILED else self.model
        generator = torch.Generator().manual_seed(0)
        size = (options.batch, options.tokens)
        self.ids = torch.randint(of.vocab_size, size, generator=generator).to(self.device)

    def prefill(self) -> None:
        with torch.no_grad():
            self.out = self.run(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self._wait()

    def decode(self) -> None:
        """`steps` tokens after the last prefill, and those of earlier calls."""
        with torch.no_grad():
            for _ in range(self.options.steps):
                token = self.out.logits[:, -1].argmax(-1, keepdim=True)
                cache = self.out.past_key_values
                self.out = self.run(input_ids=token, past_key_values=cache, use_cache=True)
        self._wait()

    def training(self) -> None:
        """The gradients of one batch. Those of the step before are let go first, as an optimiser
        does after it."""
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        self.run(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self._wait()

    def computed(self, row: str) -> torch.Tensor:
        """What the row is for, in float32: the last logits, or of a training step a gradient that
        all layers have a part in."""
        if row == "decode":
            self.prefill()
        getattr(self, row)()
        if row == "training":
            found = self.model.get_parameter("model.layers.0.input_layernorm.weight").grad
        elif row == "decode":  # the same tokens for all, whatever each finds the likeliest
            with torch.no_grad():
                found = self.run(input_ids=self.ids[:, :1], use_cache=False).logits[:, -1]
            self.prefill()
        else:
            found = self.out.logits[:, -1]
        return found.float().cpu()

    def memory(self, row: str) -> int | None:
        """Bytes."""
        self.model.zero_grad(set_to_none=True)
        return extra_memory(getattr(self, row), self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def why_not(kind: str, device: str) -> str | None:
    """Why a baseline cannot take part, or None."""
    if kind == LIGER and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install -c constraints.txt '.[peers]'"
    if kind == LIGER and device == "cpu":
        return "liger-kernel needs a GPU: its kernels run nowhere else"
    return missing(TRANSFORMERS)


def name_of(row: str, options: Options) -> str:
    many = f"{options.batch} × " if options.batch > 1 else ""
    tokens = "" if row == "decode" else f", {many}{options.tokens} tokens"
    return f"patched {WHAT[row]}, {with_layers(options.shape, options.layers_of(row))}{tokens}"


def measure(row: str, options: Options) -> Row:
    """A row of ROWS. Raises WorkerError where our own baseline does."""
    name = name_of(row, options)
    work = options.steps if row == "decode" else options.batch * options.tokens
    found = Row(name, f"{name}, beside transformers as it is", "tok/s", work)
    workers: dict[str, Worker] = {}
    try:
        _start_all(row, options, workers, found)
        compare(row, workers, found)
        calls: dict[str, Any] = {kind: partial(w.ask, row) for kind, w in workers.items()}
        processes = [os.getpid(), *(worker.process for worker in workers.values())]
        with OtherPrograms(processes) as others:
            found.samples = interleaved(calls, options.rounds, PAUSE)
        found.others = others.share if options.device == "cpu" else None
        for kind, worker in workers.items():
            if (held := worker.ask("memory", row)) is not None:
                found.memory[kind] = held
    finally:
        for worker in workers.values():
            worker.close()
    found.goals = _goals(row, found, options.device, options.baselines)
    return found


def _start_all(row: str, options: Options, workers: dict[str, Worker], found: Row) -> None:
    """Fills `workers`, or `found.missing`. On a GPU they start side by side: much of it is the
    host's work."""
    for kind in options.baselines:
        if why := why_not(kind, options.device):
            found.missing[kind] = why
    kinds = [kind for kind in options.baselines if kind not in found.missing]
    with ThreadPoolExecutor(max(1, len(kinds)) if options.device == "cuda" else 1) as pool:
        started = {kind: pool.submit(_start, kind, row, options) for kind in kinds}
    failed: dict[str, WorkerError] = {}
    for kind, future in started.items():
        try:
            workers[kind] = future.result()
        except WorkerError as error:
            failed[kind] = error
            found.missing[kind] = error.text.splitlines()[0]
    if OURS in failed:
        raise failed[OURS]


def _start(kind: str, row: str, options: Options) -> Worker:
    """A worker that has run the row, so that it is warm. Raises WorkerError."""
    layers = options.layers_of(row)
    worker = Worker(Baseline, kind, options, layers, threads=options.threads)
    try:
        for _ in range(WARM_UPS):
            for call in ("prefill", "decode") if row == "decode" else (row,):
                worker.ask(call)
    except BaseException:
        worker.close()
        raise
    return worker


def compare(row: str, workers: dict[str, Worker], found: Row) -> None:
    """Leaves out who computes something else than transformers does."""
    if TRANSFORMERS not in workers:
        return
    expected = workers[TRANSFORMERS].ask("computed", row)
    for kind in [kind for kind in workers if kind != TRANSFORMERS]:
        error = relative_rms(workers[kind].ask("computed", row), expected)
        if not error <= TOLERANCE[row]:
            found.missing[kind] = (
                f"what it computes is {error:.2g} of its size away from transformers; at most "
                f"{TOLERANCE[row]} is sound, so its time means nothing"
            )
            workers.pop(kind).close()
        else:
            found.notes.append(f"{kind}: {error:.2g} away from transformers")


def _goals(row: str, found: Row, device: str, baselines: tuple[str, ...]) -> list[Goal]:
    goals = [
        Goal(f"× {rival}", needed, found.times(rival, OURS))
        for rival, needed in GOALS[device].get(row, {}).items()
        if rival in baselines
    ]
    needed = MEMORY.get(device, {}).get(row)
    if needed is not None:
        held, own = found.memory.get(TRANSFORMERS), found.memory.get(OURS)
        share = own / held if own is not None and held else None
        goals.append(Goal("of transformers' memory", needed, share, at_most=True))
    return goals


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_patch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", default="1b", help="a preset, or demo for a quick try")
    parser.add_argument("--layers", type=int, help="of the shape; else 16, of training 4")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt or a step")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a prompt or a step")
    parser.add_argument("--steps", type=int, default=4, help="tokens of a sample of decode")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each baseline")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--baselines", "--contenders", nargs="+", choices=BASELINES, default=BASELINES
    )
    parser.add_argument("--json", type=Path, help="results file; else one named by the machine")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console

    from benchmarks.table import show

    given = vars(parse(arguments))
    rows, path = given.pop("rows"), given.pop("json")
    options = Options(**{**given, "baselines": tuple(given["baselines"])})
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        found = run_apart(roofline.measure, options.device, threads=options.threads)
        where = machine.describe(found.isa)
        stem = machine.file_name(where, options.threads, options.device)
        path = path or Path(__file__).parent / "results" / f"{stem}.json"
        for name in rows:
            row = measure(name, options)
            row.measured_with = {
                "date": results.today(),
                "shape": options.shape,
                "threads": found.threads,
                "roofline": dataclasses.asdict(found),
                "versions": machine.versions("transformers", "triton", "liger-kernel"),
            }
            results.save(path, where, [row])
            show(console, row)
    except (LlamaFastError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"written to {path}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
