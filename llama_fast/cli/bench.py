"""`llama-fast bench`: what this machine can do, and how near each op comes to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, DType, Threads, device_named, example, set_threads
from .terminal import growing, note, show, table
from .tune import tune_here

if TYPE_CHECKING:
    from ..bench.results import Row
    from ..bench.roofline import Ceilings

COLUMNS = ("op", "shape", "work", "pass", "contender", "time", "spread", "GB/s", "GFLOP/s",
           "of ceiling", "× eager")  # fmt: skip
WORK = ("decode", "prefill", "training")


@example("llama-fast bench rms_norm attention --shapes 1b,8b --work decode,prefill")
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Ops to time; all when none is.")
    ] = None,
    ceilings: Annotated[
        bool,
        typer.Option(
            "--ceilings",
            help="Measure only memory bandwidth and arithmetic, which bound every kernel's speed.",
        ),
    ] = False,
    shapes: Annotated[
        str, typer.Option(metavar="SIZES", help="Models whose sizes the ops get: 1b,8b …")
    ] = "1b",
    work: Annotated[
        str,
        typer.Option(
            metavar="KINDS",
            help="decode (one token), prefill (a prompt), training (which times the gradients).",
        ),
    ] = "decode",
    tokens: Annotated[
        str, typer.Option(metavar="N", help="Of a prompt or a training step; several: 512,2048 …")
    ] = "512",
    keys: Annotated[
        str, typer.Option(metavar="N", help="Seen by a decoded token; several: 1024,8192 …")
    ] = "8192",
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="cpu,eager …", show_default="all that serve the call"),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also torch.compile, torch's own functions, liger-kernel, flash-attn, flashinfer: "
            "those that have the op and can run here.",
        ),
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Of the tensors.")] = DType.bfloat16,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each.")] = 5,
    warm: Annotated[
        bool, typer.Option("--warm", help="The same tensors in every call: they may be in a cache.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Measure the Triton kernels' launch configurations on this GPU, and keep the "
            "fastest for its later calls.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write every sample there, for llama-fast report; rows that the file has of "
            "other calls stay.",
        ),
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time the ops at the shapes of real models, every backend beside the eager reference.

    The time of a call is the median of the samples, with their spread (between the quartiles). Of
    the ceilings, memory bandwidth or arithmetic, the one that bounds the call is named, and how
    near the call comes to it.
    """
    from ..bench import machine, results
    from ..bench import roofline as measured
    from ..dispatch import ORDER

    set_threads(threads)
    if ceilings:
        _show_ceilings()
        return
    wanted = _wanted(ops, shapes, work, _numbers("--tokens", tokens), _numbers("--keys", keys))
    if tune:
        tune_here(wanted, dtype.torch)
        return
    where = device_named(device)
    names = ORDER[where.type] if backends is None else backends.split(",")
    found = measured.measure(str(where))
    measured_with = {
        "date": results.today(),
        "threads": found.threads,
        "ceilings": vars(found),
        "versions": machine.versions("triton"),
    }
    done: list[Row] = []
    thorough = json_file is not None
    with growing(table(*COLUMNS, numbers=True)) as lines:
        for row in _rows(wanted, found, names, peers, dtype, str(where), rounds, warm, thorough):
            row.measured_with = measured_with
            done.append(row)
            for contender in row.samples:
                lines.add_row(*_cells(row, contender))
    if any(row.too_noisy for row in done):
        note("~ too noisy: samples that spread over a tenth, or other programs that were busy")
    if json_file is not None:
        results.save(json_file, machine.describe(found.isa), done)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} is {text}; it must be whole numbers from 1: 512,2048")
    return [int(part) for part in parts]


def _wanted(
    ops: list[str] | None, shapes: str, work: str, tokens: list[int], keys: list[int]
) -> list[tuple[str, str, Any, Any]]:
    """(op, name of the shape, config, work) of everything to time, checked before any of it."""
    from ..bench.shapes import NAMES, Work
    from ..config import LlamaConfig
    from ..errors import BackendError

    if unknown := [name for name in ops or () if name not in NAMES]:
        raise BackendError(f"no op {', '.join(unknown)}; there are {', '.join(NAMES)}")
    kinds = work.split(",")
    if unknown := [kind for kind in kinds if kind not in WORK]:
        raise typer.BadParameter(f"--work is {', '.join(unknown)}; it must be {' or '.join(WORK)}")
    works = {
        "decode": [Work.decode(n) for n in keys],
        "prefill": [Work.prefill(n) for n in tokens],
        "training": [Work.training(n) for n in tokens],
    }
    return [
        (op, name, LlamaConfig.preset(name), one)
        for name in shapes.split(",")
        for kind in kinds
        for one in works[kind]
        for op in ops or NAMES
    ]


def _rows(
    wanted: list[tuple[str, str, Any, Any]],
    ceilings: Ceilings,
    names: Sequence[str],
    peers: bool,
    dtype: DType,
    device: str,
    rounds: int,
    warm: bool,
    thorough: bool,
) -> Iterator[Row]:
    """Each measurement when it is there; contenders that cannot take part are named."""
    from ..bench import baselines as contenders
    from ..bench.measure import FORWARD, measure, passes
    from ..bench.shapes import workloads
    from ..dispatch import OPS

    for op, shape, config, work in wanted:
        training = work.name == "training"
        which = passes(OPS[op])[-1] if training else FORWARD
        if training and which == FORWARD:
            note(f"{op} has no gradient: training does not call it")
            continue
        made = workloads(op, config, work, dtype=dtype.torch, device=device, gradient=training)
        for workload, make in made.items():
            args = make(0)
            able = []
            for name in [*names, *(contenders.peers(OPS[op]) if peers else ())]:
                why = contenders.why_not(name, OPS[op], args, gradient=training)
                if why:
                    note(f"{workload}: {name} cannot serve it: {'; '.join(why)}")
                else:
                    able.append(name)
            row = measure(
                workload,
                make,
                able,
                shape=shape,
                work=work,
                ceilings=ceilings,
                which=which,
                rounds=rounds,
                warm=warm,
                thorough=thorough,
            )
            for why in row.missing.values():
                note(f"{workload}, {which}: {why}")
            yield row


def _cells(row: Row, contender: str) -> list[str]:
    from ..bench.shapes import Work

    time, spread, *others = row.figures(contender)
    call = row.call
    return [
        call["workload"],
        call["shape"],
        str(Work(call["work"], call["batch"], call["tokens"], call["keys"])),
        call["pass"],
        contender,
        time,
        spread + (" ~" if row.too_noisy else ""),
        *others,
    ]


def _show_ceilings() -> None:
    import torch

    from ..bench.roofline import measure

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        found = measure(device)
        where = "CPU" if device == "cpu" else f"{device}, {torch.cuda.get_device_name(device)}"
        if device == "cpu":
            where += f", {found.threads} threads, {found.isa or 'C++ kernels not built'}"
        rows = table("", "", numbers=True)
        for name, value, unit in (
            ("memory read", found.read, "GB/s"),
            ("memory copy, both ways counted", found.copy, "GB/s"),
            ("float32 multiply-add", found.float32, "GFLOP/s"),
            ("bfloat16 multiply-add", found.bfloat16, "GFLOP/s"),
        ):
            if value is not None:
                rows.add_row(name, f"{value / 1e9:,.1f} {unit}")
        show(where, rows)
