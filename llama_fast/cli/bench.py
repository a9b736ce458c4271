"""`llama-fast bench`: what this machine can do, and how near each op comes to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BackendError
from .options import (
    Debug,
    Device,
    DType,
    Threads,
    device_named,
    example,
    file_to_write,
    set_threads,
)
from .sizes import LAPTOP, sized
from .terminal import columns, growing, note, show, table
from .tune import tune_here

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.results import Row
    from ..bench.roofline import Roofline

NARROW = 100  # columns of a terminal, below which GB/s and GFLOP/s are left out
WORK = ("decode", "prefill", "training")


@example("llama-fast bench rms_norm attention --shapes 1b,8b --work decode,prefill")
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Ops to time; all when none is.")
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--ceilings",
            help="Measure only memory bandwidth and arithmetic, which bound every kernel's speed.",
        ),
    ] = False,
    shapes: Annotated[
        str,
        typer.Option(
            metavar="SIZES", help=f"Models whose sizes the ops get: 1b,8b …; {LAPTOP} for a laptop."
        ),
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
            callback=file_to_write,
        ),
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time the ops at the shapes of real models, every backend beside the eager reference.

    The time of a call is the median of the samples, with their spread (between the quartiles). "of
    peak" is the part that the call reaches of this machine's own peak bandwidth (read, copy) or
    peak FLOP/s (float32, bfloat16), whichever bounds it.
    """
    from ..bench import machine, results
    from ..bench import roofline as measured
    from ..dispatch import BACKENDS, ORDER

    set_threads(threads)
    if roofline:
        _show_roofline()
        return
    wanted = _wanted(ops, shapes, work, _numbers("--tokens", tokens), _numbers("--keys", keys))
    if tune:
        tune_here(wanted, dtype.torch)
        return
    where = device_named(device)
    names = ORDER[where.type] if backends is None else backends.split(",")
    if all(name in BACKENDS for name in names) and not set(names) & set(ORDER[where.type]):
        raise BackendError(
            f"--backends {backends}: tensors on {where.type} are served by "
            f"{', '.join(ORDER[where.type])}; give --backends {','.join(ORDER[where.type])}"
            + (", or --device cuda on a machine with a GPU" if where.type == "cpu" else "")
        )
    found = measured.measure(str(where))
    measured_with = {
        "date": results.today(),
        "threads": found.threads,
        "roofline": vars(found),
        "versions": machine.versions("triton"),
    }
    thorough = json_file is not None
    if thorough:
        results.earlier(json_file, machine.describe(found.isa))  # may refuse, so before the work
    done: list[Row] = []
    missing: dict[tuple[str, str], list[str]] = {}
    for (shape, calls), group in groupby(wanted, key=lambda one: (one[1], one[3])):
        show(_heading(shape, calls, dtype.value, str(where), found))
        with growing(_table()) as lines:
            for row in _rows(
                list(group), found, names, peers, dtype, str(where), rounds, warm, thorough, missing
            ):
                row.measured_with = measured_with
                done.append(row)
                for baseline in row.samples:
                    lines.add_row(*_cells(row, baseline))
    _say_missing(missing)
    if not done:
        raise BackendError(_nothing_measured(backends, where.type))
    _say_noisy(done)
    if json_file is not None:
        results.save(json_file, machine.describe(found.isa), done)
        note(f"Written: {json_file}. Next: llama-fast report {json_file}")


def _nothing_measured(backends: str | None, device: str) -> str:
    from ..dispatch import ORDER

    if backends is None:
        return "none of these ops has the pass that was asked for; give other --work"
    there = ",".join(ORDER[device])
    return f"--backends {backends}: none of them serves these calls on {device}; give {there}"


def _say_missing(missing: dict[tuple[str, str], list[str]]) -> None:
    """Says of each baseline why it took no part, once for all of its calls."""
    for (name, why), calls in missing.items():
        of = ", ".join(calls[:3]) + (f" and {len(calls) - 3} others" if len(calls) > 3 else "")
        note(f"{of}: {name} cannot serve it: {why}")


def _say_noisy(done: list[Row]) -> None:
    from ..bench.timing import TOO_BUSY, TOO_NOISY

    if any(value > TOO_NOISY for row in done for value in row.spreads().values()):
        note(f"~ samples that spread over more than {TOO_NOISY:.0%}: give more --rounds")
    busy = max((row.others or 0 for row in done), default=0)
    if busy > TOO_BUSY:
        note(
            f"Other programs took up to {busy:.0%} of the processors' time: these times are too "
            "noisy to count, whatever their spread; end those programs and measure again"
        )


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"{text} is no list of whole numbers from 1. Write for example: {option} 512,2048",
            param_hint=option,
        )
    return [int(part) for part in parts]


def _wanted(
    ops: list[str] | None, shapes: str, work: str, tokens: list[int], keys: list[int]
) -> list[tuple[str, str, Any, Any]]:
    """Returns (op, name of the shape, config, work) of everything to time, all of it checked."""
    from ..bench.shapes import NAMES, Work

    if unknown := [name for name in ops or () if name not in NAMES]:
        raise BackendError(
            f"there is no op {', '.join(unknown)}; write one or several of {', '.join(NAMES)}"
        )
    kinds = work.split(",")
    if unknown := [kind for kind in kinds if kind not in WORK]:
        raise typer.BadParameter(
            f"there is no work {', '.join(unknown)}. Write one or several of {','.join(WORK)}",
            param_hint="--work",
        )
    works = {
        "decode": [Work.decode(n) for n in keys],
        "prefill": [Work.prefill(n) for n in tokens],
        "training": [Work.training(n) for n in tokens],
    }
    return [
        (op, name, sized(name), one)
        for name in shapes.split(",")
        for kind in kinds
        for one in works[kind]
        for op in ops or NAMES
    ]


def _rows(
    wanted: list[tuple[str, str, Any, Any]],
    roofline: Roofline,
    names: Sequence[str],
    peers: bool,
    dtype: DType,
    device: str,
    rounds: int,
    warm: bool,
    thorough: bool,
    missing: dict[tuple[str, str], list[str]],
) -> Iterator[Row]:
    """Yields each measurement when it is there. `missing` takes (baseline, why it cannot take
    part) → calls."""
    from ..bench import baselines
    from ..bench.measure import FORWARD, measure, passes
    from ..bench.shapes import problem_shapes
    from ..dispatch import OPS

    for op, shape, config, work in wanted:
        training = work.name == "training"
        which = passes(OPS[op])[-1] if training else FORWARD
        if training and which == FORWARD:
            note(f"{op} has no gradient: training does not call it")
            continue
        made = problem_shapes(op, config, work, dtype=dtype.torch, device=device, gradient=training)
        for problem, make in made.items():
            args = make(0)
            if training and not OPS[op].has_gradient(*args):
                continue
            able = []
            for name in [*names, *(baselines.peers(OPS[op]) if peers else ())]:
                why = baselines.why_not(name, OPS[op], args, gradient=training)
                if why:
                    calls = missing.setdefault((name, "; ".join(why)), [])
                    calls += [problem] * (problem not in calls)
                else:
                    able.append(name)
            if not able:
                continue
            row = measure(
                problem,
                make,
                able,
                shape=shape,
                work=work,
                roofline=roofline,
                which=which,
                rounds=rounds,
                warm=warm,
                thorough=thorough,
            )
            for name, why in row.missing.items():
                missing.setdefault((name, why), []).append(f"{problem}, {which}")
            if row.samples:
                yield row


def _heading(shape: str, work: Any, dtype: str, device: str, roofline: Roofline) -> str:
    """Returns what all calls of a table have in common."""
    where = device
    if device == "cpu":
        where += f" ({_threads_and_isa(roofline)})"
    gradients = " (gradients)" if work.name == "training" else ""
    return f"{work}{gradients} of {shape}, {dtype}, on {where}"


def _threads_and_isa(roofline: Roofline) -> str:
    threads = f"{roofline.threads} thread{'s' * (roofline.threads != 1)}"
    return f"{threads}, {roofline.isa or 'C++ kernels not built'}"


def _narrow() -> bool:
    return columns() < NARROW


def _table() -> Table:
    rates = () if _narrow() else ("GB/s", "GFLOP/s")
    header = ("op", "by", "time", "spread", *rates, "of peak", "× eager")
    return table(*header, numbers=True, texts=2)


def _cells(row: Row, baseline: str) -> list[str]:
    from ..bench.measure import BOTH
    from ..bench.timing import TOO_NOISY

    time, spread, bandwidth, flops, share, eager = row.figures(baseline)
    return [
        row.call["problem"] + " and forward" * (row.call["pass"] == BOTH),
        baseline,
        time,
        spread + (" ~" if row.spreads()[baseline] > TOO_NOISY else ""),
        *([] if _narrow() else [bandwidth, flops]),
        share,
        eager,
    ]


def _show_roofline() -> None:
    import torch

    from ..bench.roofline import measure

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        found = measure(device)
        where = "CPU" if device == "cpu" else f"{device}, {torch.cuda.get_device_name(device)}"
        if device == "cpu":
            where += f", {_threads_and_isa(found)}"
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
