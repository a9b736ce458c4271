"""The targets of training on the CPU, measured in one run beside transformers with PEFT.

    python -m benchmarks.train [--rows NAME ...] [--shape 1b] [--layers N] [--threads N]

A LoRA's step with every label, with half of them, of a long text, and of eight documents, packed
by us and padded by them; over integers; its memory; what AdamW moves, beside a copy; attention's
backward pass beside SDPA's and as many multiply-adds; and the memory of an 8B QLoRA and of a full
training. All baselines of a row take turns, each in its own process, as in `python -m
benchmarks.cpu`. Everything goes to benchmarks/results/<machine>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.models import HOW_TO_INSTALL, PAUSE, goals_of, shape
from benchmarks.optimizer import arguments as adamw_arguments
from benchmarks.peers import lora
from benchmarks.peers.lora import Batch
from benchmarks.run import chosen, measure, say
from benchmarks.worker import Worker, WorkerError, run_apart
from llama_fast.bench import machine
from llama_fast.bench.results import COPY, MULTIPLY_ADDS, OURS, Goal, Row
from llama_fast.bench.roofline import multiply_adds
from llama_fast.bench.timing import OtherPrograms, interleaved
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, use_backend
from llama_fast.errors import LlamaFastError

PEFT = "transformers + PEFT"
BFLOAT16 = "llama_fast, bfloat16 weights"
WORKERS = {OURS: lora.OursLora, BFLOAT16: lora.OursLora, PEFT: lora.PeftLora}
DOCUMENTS = tuple(random.Random(0).choices(range(64, 512), k=8))
# (row, what it trains on, what ours must be: times as fast as another, or part of a peak rate)
STEPS = {
    "lora": ("512 tokens", Batch((512,)), {PEFT: 1.3, MULTIPLY_ADDS: 0.70}),
    "lora half masked": ("512 tokens, half of them a prompt", Batch((512,), 0.5), {PEFT: 1.4}),
    "lora long": ("2048 tokens", Batch((2048,)), {PEFT: 1.4}),
    "lora packed": ("8 documents of 64 to 511 tokens", Batch(DOCUMENTS), {PEFT: 1.7}),
}
PART_OF_MEMORY, PART_OF_BFLOAT16 = 0.65, 0.85
ADAMW_ELEMENTS = 2**26
HEADS = {"1b": (32, 8, 64), "8b": (32, 8, 128)}  # query heads, KV heads, D


def timed(
    row: Row,
    made: dict[str, tuple],
    threads: int,
    rounds: int,
    flops: int = 0,
) -> dict[str, int]:
    """Fills the row's samples with rounds in turn; returns the peak memory of each in bytes.

    made   what makes each baseline's step in its process: a class and its arguments
    flops  of a step; else no multiply-adds take part
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, arguments in made.items():
            say(f"{row.name}: building {name}")
            workers[name] = stack.enter_context(Worker(*arguments, threads=threads))
        peaks = {name: worker.ask("first_peak") for name, worker in workers.items()}
        calls = {name: partial(worker.ask, "__call__") for name, worker in workers.items()}
        watched = [os.getpid(), *(worker.process for worker in workers.values())]
        if flops:
            worker = stack.enter_context(Worker(multiply_adds, flops, True, threads=threads))
            calls[MULTIPLY_ADDS] = partial(worker.ask, "__call__")
            watched.append(worker.process)
            worker.ask("__call__")
        say(f"{row.name}: {rounds} rounds")
        with OtherPrograms(watched) as others:
            row.samples = interleaved(calls, rounds, PAUSE, warm_up=False)
        row.others = others.share
    return peaks


def lora_step(name: str, config: LlamaConfig, threads: int, rounds: int) -> Row:
    what, batch, goals = STEPS[name]
    row = Row(name, f"LoRA r={lora.RANK}, {what}, bf16", "tok/s", batch.tokens)
    made = {OURS: (lora.OursLora, config, batch)}
    absent = [each for each in ("transformers", "peft") if not importlib.util.find_spec(each)]
    if absent:
        row.missing[PEFT] = f"{' and '.join(absent)} not installed: {HOW_TO_INSTALL}"
    else:
        made[PEFT] = (lora.PeftLora, config, batch)
    flops = lora.flops(config, batch) if MULTIPLY_ADDS in goals else 0
    peaks = timed(row, made, threads, rounds, flops)
    row.goals = goals_of(row, goals)
    row.notes = [f"{each}: peak memory {nbytes / 1e9:.2f} GB" for each, nbytes in peaks.items()]
    if name == "lora":
        part = peaks[OURS] / peaks[PEFT] if PEFT in peaks else None
        row.goals.append(Goal("of its peak memory", PART_OF_MEMORY, part, at_most=True))
    return row


def lora_over_integers(config: LlamaConfig, threads: int, rounds: int) -> Row:
    batch = STEPS["lora"][1]
    what = f"QLoRA r={lora.RANK}, 512 tokens, int4 weights below"
    row = Row("lora int4", what, "tok/s", batch.tokens)
    made = {OURS: (lora.OursLora, config, batch, "int4"), BFLOAT16: (lora.OursLora, config, batch)}
    peaks = timed(row, made, threads, rounds)
    row.goals = goals_of(row, {BFLOAT16: PART_OF_BFLOAT16})
    row.notes = [f"{each}: peak memory {nbytes / 1e9:.2f} GB" for each, nbytes in peaks.items()]
    return row


def adamw(threads: int, rounds: int) -> Row:
    """The bytes that a step must move against those of a copy, in turn."""
    samples, others, moved, copied = run_apart(_adamw, rounds, threads=threads)
    row = Row("adamw", f"AdamW, {ADAMW_ELEMENTS >> 20} Mi float32 weights", "GB/s", moved / 1e9)
    row.samples, row.others = samples, others
    row.samples[COPY] = [seconds * moved / copied for seconds in samples[COPY]]
    row.goals = [Goal("of copy bandwidth", 0.85, row.times(COPY, OURS))]
    return row


def _adamw(rounds: int) -> tuple[dict[str, list[float]], float | None, int, int]:
    op, args = OPS["adamw"], adamw_arguments(ADAMW_ELEMENTS, torch.float32, False)
    source = torch.ones(ADAMW_ELEMENTS)
    target = torch.ones_like(source)
    calls = {OURS: lambda: op(*args), COPY: lambda: target.copy_(source)}
    with torch.no_grad(), use_backend("cpu", strict=True), OtherPrograms([os.getpid()]) as others:
        samples = interleaved(calls, rounds, PAUSE)
    return samples, others.share, op.cost(*args).bytes, source.nbytes + target.nbytes


def attention_backward(name: str, tokens: int, threads: int, rounds: int) -> Row:
    H, K, D = HEADS[name]
    what = f"attention's backward pass, causal, {tokens} tokens, heads {H}/{K}, D {D}, bf16"
    flops = 5 * 2 * H * D * (tokens * (tokens + 1) // 2)
    row = Row(f"attention backward {name}", what, "GFLOP/s", flops / 1e9)
    row.samples, row.others = run_apart(
        _attention_backward, (H, K, D), tokens, flops, rounds, threads=threads
    )
    row.goals = goals_of(row, {"SDPA": 2.0, MULTIPLY_ADDS: 0.5})
    return row


def _attention_backward(
    heads: tuple[int, int, int], T: int, flops: int, rounds: int
) -> tuple[dict[str, list[float]], float | None]:
    from llama_fast import attention

    (H, K, D), g = heads, torch.Generator().manual_seed(0)

    def leaf(n: int) -> torch.Tensor:
        return torch.randn(1, T, n, D, generator=g).bfloat16().requires_grad_()

    inputs, grad = [leaf(H), leaf(K), leaf(K)], torch.randn(1, T, H, D, generator=g).bfloat16()
    ours = attention(*inputs, causal=True)
    heads_first = (x.transpose(1, 2) for x in inputs)
    sdpa = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    results = {OURS: ours, "SDPA": sdpa.transpose(1, 2)}

    def backward(name: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(results[name], inputs, grad, retain_graph=True)

    for found, expected in zip(backward(OURS), backward("SDPA"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    calls: dict[str, Callable[[], Any]] = {name: partial(backward, name) for name in results}
    calls[MULTIPLY_ADDS] = multiply_adds(flops, True)
    with OtherPrograms([os.getpid()]) as others:
        samples = interleaved(calls, rounds, PAUSE)
    return samples, others.share


def memory(name: str, what: str, gigabytes: float, threads: int, make: Callable, *args: Any) -> Row:
    """Peak resident memory of a step, in a process of its own."""
    row = Row(name, f"peak memory of {what}, 512 tokens, checkpointed", "GB")
    say(f"{name}: building and one step")
    with Worker(make, *args, threads=threads) as worker:
        row.samples[OURS] = [worker.ask("first_peak") / 1e9]
    row.goals = [Goal("GB", gigabytes, row.samples[OURS][0], at_most=True)]
    return row


def rows_by_name(given: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    """Every row, in the table's order."""
    of = (given.threads, given.rounds)
    config = lora.with_layers(shape(given.shape), given.layers)
    rows: dict[str, Callable[[], Row]] = {
        name: partial(lora_step, name, config, *of) for name in STEPS
    }
    rows["lora int4"] = partial(lora_over_integers, config, *of)
    rows["adamw"] = partial(adamw, *of)
    for name in HEADS:
        rows[f"attention backward {name}"] = partial(attention_backward, name, given.tokens, *of)
    batch = Batch((512,))
    of_8b = lora.with_layers(shape("8b"), given.layers)
    qlora = (lora.OursLora, of_8b, batch, "int4", True)
    name, what = "memory qlora 8b", "a QLoRA's step, 8b in int4"
    rows[name] = partial(memory, name, what, 7.5, given.threads, *qlora)
    name = f"memory full {given.shape}"
    what = f"a full step of {given.shape}, 8-bit moments, steps in the backward pass"
    rows[name] = partial(memory, name, what, 8.0, given.threads, lora.OursFull, config, batch)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="The targets of training on the CPU, measured in one run beside PEFT.",
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some only; --list shows them")
    parser.add_argument("--list", action="store_true", help="the rows' names, and nothing else")
    parser.add_argument("--shape", default="1b", help="a preset, or demo for a quick try")
    parser.add_argument("--layers", type=int, help="of the shape; by default all")
    parser.add_argument("--tokens", type=int, default=2048, help="of attention's backward pass")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="samples of each baseline")
    parser.add_argument("--json", type=Path, help="results file; else one named by the machine")
    given = parser.parse_args(arguments)
    if min(given.threads, given.rounds, given.tokens, given.layers or 1) < 1:
        parser.error("--layers, --tokens, --threads and --rounds must be at least 1")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        return run(given, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    except (LlamaFastError, WorkerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(given: argparse.Namespace, console: Console) -> int:
    rows = rows_by_name(given)
    if given.list:
        print("\n".join(rows))
        return 0
    versions = machine.versions("transformers", "peft")
    names = chosen(rows, given.rows)
    measure(rows, names, given, console, layers=given.layers, versions=versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
