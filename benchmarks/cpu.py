"""The project's targets on the CPU, measured in one run beside the peers: `make bench-cpu`.

    python -m benchmarks.cpu [--rows NAME ...] [--shape 1b] [--threads N] [--isa avx2] [--8b]

First the machine's own peak rates, then a row for each line of the table: decode and prefill of a
whole model, ours beside transformers, llama.cpp, ik_llama, OpenVINO GenAI and CTranslate2 on the
same random weights, attention beside SDPA, the memory-bound ops beside torch.compile, the cost of a
call, and memory. All baselines of a row take turns, round by round, with the same number of
threads, and so does what the machine can do at most, a plain read or copy of as many bytes or as
many multiply-adds: a figure is the median over the rounds. Everything goes to
benchmarks/results/<machine>.json; the rows that were not asked for stay there as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import elementwise, isa, kernels, memory, models
from benchmarks.models import PART_OF
from benchmarks.run import chosen, measure, say
from benchmarks.worker import WorkerError, run_apart
from llama_fast.bench import machine
from llama_fast.bench.results import COPY, MULTIPLY_ADDS, OURS, READ, Goal, Row
from llama_fast.bench.shapes import Work
from llama_fast.bench.timing import ratio
from llama_fast.config import LlamaConfig
from llama_fast.errors import LlamaFastError

PEERS = (
    *("transformers", "llama-cpp-python", "gguf", "numpy"),
    *("openvino-genai", "ctranslate2", "ik-llama-cpp-python"),
)

# What each row must reach: times as fast as a peer, or the part of a peak rate.
DECODE = {
    "bf16": {"transformers": 4.0, "llama.cpp bf16": 1.6, READ: 0.90},
    "int8": {"llama.cpp q8_0": 1.6, READ: 0.85},
    "int4": {"llama.cpp q4_0": 1.6, "ik_llama q4_0": 1.0, READ: 0.75},
}
PREFILL = {
    "bf16": {"transformers": 1.3, "llama.cpp bf16": 1.5, MULTIPLY_ADDS: 0.75},
    "int8": {"llama.cpp q8_0": 1.5, "OpenVINO q8_0": 1.3},
    "int4": {"llama.cpp q4_0": 1.5, "OpenVINO q4_0": 1.3},
}
COMPILED = {"rms_norm": 1.0, "add_rms_norm": 1.0, "swiglu": 1.2, "rope": 1.2}  # × torch.compile
COPIED = 0.85  # of the speed of a copy
CALLED = ("rms_norm", "add_rms_norm", "swiglu", "rope", "kv_append", "attention", "linear")
MICROSECONDS = 5.0
# (shape, weights, `quantize`, gigabytes)
MEMORY = [("1b", "int4", "int4", 1.1), ("8b", "bf16", None, 16.8), ("8b", "int4", "int4", 5.5)]
LONG_PROMPT, ITS_GIGABYTES = 32768, 1.0


@dataclass(frozen=True)
class Sizes:
    """Of the rows of single ops: Llama 3.1 8B's, or small ones to try the command with."""

    config: LlamaConfig
    prompt: int  # tokens of causal attention
    keys: int  # that one query sees
    tokens: int  # of the memory-bound ops
    calls: int  # of a memory-bound op in a sample


LARGE = Sizes(elementwise.LARGE[0], 1024, 8192, elementwise.LARGE[1], calls=10)
SMALL = Sizes(elementwise.SMALL[0], 32, 64, elementwise.SMALL[1], calls=1)


def rows_by_name(
    made: models.Models, sizes: Sizes, threads: int, rounds: int
) -> dict[str, Callable[[], Row]]:
    """Every row but those of --8b, in the table's order."""
    rows: dict[str, Callable[[], Row]] = {}
    for form, goals in DECODE.items():
        rows[f"decode {form}"] = partial(models.decode, made, form, goals)
    for form, goals in PREFILL.items():
        rows[f"prefill {form}"] = partial(models.prefill, made, form, goals)
    rows["attention prompt"] = partial(attention_of_prompt, sizes, threads, rounds)
    rows["attention query"] = partial(attention_of_query, sizes, threads, rounds)
    for name, needed in COMPILED.items():
        rows[name] = partial(memory_bound, name, needed, sizes, threads, rounds)
    rows["call"] = partial(cost_of_calls, threads, rounds)
    return rows


def attention_of_prompt(sizes: Sizes, threads: int, rounds: int) -> Row:
    work = Work.prefill(sizes.prompt)
    found = run_apart(kernels.attention, rounds, sizes.config, work, 1, threads=threads)
    what = f"attention, causal, {sizes.prompt} tokens, {_heads(sizes)}, bf16"
    row = Row("attention prompt", what, "GFLOP/s", found.flops / 1e9, found.samples, found.others)
    row.goals = [
        Goal("× SDPA", 4.0, ratio(found.samples, "SDPA", OURS)),
        Goal(PART_OF[MULTIPLY_ADDS], 0.6, ratio(found.samples, MULTIPLY_ADDS, OURS)),
    ]
    return row


def attention_of_query(sizes: Sizes, threads: int, rounds: int) -> Row:
    work, layers = Work.decode(sizes.keys), kernels.LAYERS
    found = run_apart(kernels.attention, rounds, sizes.config, work, layers, threads=threads)
    what = f"attention, 1 query, {sizes.keys} keys, {_heads(sizes)}, bf16, {layers} caches in turn"
    row = Row("attention query", what, "GB/s", found.bytes / 1e9, found.samples, found.others)
    row.goals = [Goal(PART_OF[READ], 0.85, ratio(found.samples, READ, OURS))]
    return row


def _heads(sizes: Sizes) -> str:
    return f"heads {sizes.config.n_heads}/{sizes.config.n_kv_heads}, D {sizes.config.head_dim}"


WIDTHS = {"swiglu": "hidden_dim", "rms_norm": "dim", "add_rms_norm": "dim"}


def memory_bound(name: str, needed: float, sizes: Sizes, threads: int, rounds: int) -> Row:
    size = (sizes.config, sizes.tokens)
    found = run_apart(kernels.memory_bound, rounds, name, size, sizes.calls, threads=threads)
    width = getattr(sizes.config, WIDTHS[name]) if name in WIDTHS else _heads(sizes)
    what = f"{name}, {sizes.tokens} × {width}, bf16"
    row = Row(name, what, "GB/s", found.bytes / 1e9, found.samples, found.others)
    row.goals = [
        Goal("× torch.compile", needed, ratio(found.samples, "torch.compile", OURS)),
        Goal("of copy bandwidth", COPIED, ratio(found.samples, COPY, OURS)),
    ]
    return row


def cost_of_calls(threads: int, rounds: int) -> Row:
    samples, others = run_apart(kernels.call_costs, rounds, CALLED, threads=threads)
    row = Row("call", "processor time of a call on tiny tensors, without gradient", "µs")
    row.samples, row.others = samples, others
    slowest = max(row.medians().values())
    row.goals = [Goal("µs, the slowest op", MICROSECONDS, slowest, at_most=True)]
    return row


def llama_cpp_says() -> dict[str, str]:
    import llama_cpp

    from benchmarks.peers.llama_cpp import system_info

    return {"version": llama_cpp.llama_version().decode(), "system_info": system_info()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description="The project's targets on the CPU, measured in one run beside the peers.",
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="some rows only; --list shows them"
    )
    parser.add_argument("--list", action="store_true", help="the rows' names, and nothing else")
    parser.add_argument("--shape", default="1b", help="a preset, or demo for a quick try")
    older = "hold ours, torch and llama.cpp to this instruction set; see benchmarks/isa.py"
    parser.add_argument("--isa", choices=isa.VARIABLES, help=older)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="samples of each baseline")
    parser.add_argument("--steps", type=int, default=8, help="tokens of one sample of decode")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of one prefill")
    large = "also the memory of the 8B shape: needs 17 GB of disk and of memory"
    parser.add_argument("--8b", dest="large", action="store_true", help=large)
    parser.add_argument("--json", type=Path, help="results file; else one named by the machine")
    parser.add_argument("--tmp", type=Path, help="folder for weights, removed at the end")
    parser.add_argument("--keep", type=Path, help="folder for weights that stay, for another run")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1 or given.steps < 1 or given.prompt < 1:
        parser.error("--rounds, --threads, --steps and --prompt must be at least 1")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="llama-fast-bench-", dir=given.tmp) as folder:
        try:
            return run(given, given.keep or Path(folder), console)
        except (LlamaFastError, WorkerError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def run(given: argparse.Namespace, folder: Path, console: Console) -> int:
    if given.isa:
        isa.hold_to(given.isa)

    def of_shape(name: str) -> models.Models:
        where = folder / name
        where.mkdir(parents=True, exist_ok=True)
        numbers = (given.threads, given.rounds, given.prompt, given.steps)
        return models.Models(models.shape(name), where, *numbers, say)

    made = of_shape(given.shape)
    sizes = SMALL if given.shape == "demo" else LARGE
    rows = rows_by_name(made, sizes, given.threads, given.rounds)
    for name, form, quantize, gigabytes in MEMORY:
        if name == given.shape or (name == "8b" and given.large):
            models_of = made if name == given.shape else of_shape(name)
            of = (models_of, name, form, quantize, gigabytes)
            rows[f"memory {name} {form}"] = partial(memory.peak, *of)
    if given.large:
        rows["memory prompt"] = partial(
            memory.prompt, LlamaConfig.preset("8b"), LONG_PROMPT, given.threads, ITS_GIGABYTES
        )
    if given.list:
        print("\n".join(rows))
        return 0
    names = chosen(rows, given.rows)

    installed = importlib.util.find_spec("llama_cpp") and not isa.no_llama_cpp()
    facts = run_apart(llama_cpp_says, threads=given.threads) if installed else None
    versions = {**machine.versions(*PEERS), "llama.cpp": facts}
    measure(rows, names, given, console, versions=versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
