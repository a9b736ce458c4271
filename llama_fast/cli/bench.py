"""`llama-fast bench`: what this machine can do, and how near each op comes to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, DType, Threads, example, set_threads
from .terminal import growing, note, show, table
from .tune import tune_here

if TYPE_CHECKING:
    from ..ceilings import Ceilings
    from ..speed import Speed

COLUMNS = ("op", "shape", "work", "backend", "time", "spread", "GB/s", "GFLOP/s", "of ceiling",
           "× eager")  # fmt: skip
WORK = ("decode", "prefill")


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
        str, typer.Option(metavar="KINDS", help="decode (one token), prefill (a prompt), or both.")
    ] = "decode",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of a prompt.")] = 512,
    keys: Annotated[int, typer.Option(min=1, metavar="N", help="Seen by a decoded token.")] = 8192,
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="cpu,eager …", show_default="all that serve the call"),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the tensors.")] = DType.bfloat16,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
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
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every sample there.")
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time the ops at the shapes of real models, every backend beside the eager reference.

    The time of a call is the median of the samples, with their spread (between the quartiles). Of
    the ceilings, memory bandwidth or arithmetic, the one that bounds the call is named, and how
    near the call comes to it.
    """
    from .. import ceilings as measured
    from .. import machine

    set_threads(threads)
    if ceilings:
        _show_ceilings()
        return
    wanted = _wanted(ops, shapes, work, tokens, keys)
    if tune:
        tune_here(wanted, dtype.torch)
        return
    names = _order(device) if backends is None else backends.split(",")
    found = measured.measure(device)
    speeds: list[Speed] = []
    with growing(table(*COLUMNS, numbers=True)) as rows:
        for speed in _speeds(wanted, found, names, dtype, device, rounds, warm):
            speeds.append(speed)
            rows.add_row(*_cells(speed))
    if any(speed.too_noisy for speed in speeds):
        note("~ too noisy: samples that spread over a tenth, or other programs that were busy")
    if json_file is not None:
        content = {
            "machine": machine.describe(found.isa),
            "versions": machine.versions("triton"),
            "ceilings": vars(found),
            "results": [speed.record() for speed in speeds],
        }
        _write(json_file, content)


def _wanted(
    ops: list[str] | None, shapes: str, work: str, tokens: int, keys: int
) -> list[tuple[str, str, Any, Any]]:
    """(op, name of the shape, config, work) of everything to time, checked before any of it."""
    from ..config import LlamaConfig
    from ..errors import BackendError
    from ..workloads import NAMES, Work

    if unknown := [name for name in ops or () if name not in NAMES]:
        raise BackendError(f"no op {', '.join(unknown)}; there are {', '.join(NAMES)}")
    kinds = work.split(",")
    if unknown := [kind for kind in kinds if kind not in WORK]:
        raise typer.BadParameter(f"--work is {', '.join(unknown)}; it must be {' or '.join(WORK)}")
    works = {"decode": Work.decode(keys), "prefill": Work.prefill(tokens)}
    return [
        (op, name, LlamaConfig.preset(name), works[kind])
        for name in shapes.split(",")
        for kind in kinds
        for op in ops or NAMES
    ]


def _order(device: str) -> Sequence[str]:
    """The backends in line for a device that is there."""
    import torch

    from ..errors import BackendError
    from ..registry import ORDER

    kind = device.partition(":")[0]
    if kind not in ORDER:
        raise BackendError(f"no device {device!r}; there are {', '.join(ORDER)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError("no GPU that this torch can use; leave --device out, or see doctor")
    return ORDER[kind]


def _speeds(
    wanted: list[tuple[str, str, Any, Any]],
    ceilings: Ceilings,
    names: Sequence[str],
    dtype: DType,
    device: str,
    rounds: int,
    warm: bool,
) -> Iterator[Speed]:
    """Each measurement when it is there; backends that cannot serve are named."""
    from ..registry import OPS
    from ..speed import measure, why_not
    from ..workloads import workloads

    for op, shape, config, work in wanted:
        made = workloads(op, config, work, dtype=dtype.torch, device=device)
        for workload, make in made.items():
            args = make(0)
            refused = {name: why_not(OPS[op], args, name) for name in names}
            for name, why in refused.items():
                if why:
                    note(f"{workload}: {name} cannot serve it: {'; '.join(why)}")
            able = [name for name, why in refused.items() if not why]
            yield from measure(
                workload,
                make,
                able,
                shape=shape,
                work=work,
                ceilings=ceilings,
                rounds=rounds,
                warm=warm,
            )


def _cells(speed: Speed) -> list[str]:
    from ..timing import spread

    median = speed.median
    share = "" if speed.share is None else f"{speed.share:.0%} {speed.ceiling}"
    eager = "" if speed.times_eager is None else f"{speed.times_eager:.2f}"
    return [
        speed.workload,
        speed.shape,
        speed.work,
        speed.backend,
        f"{median * 1e6:,.1f} µs" if median < 1e-2 else f"{median * 1e3:,.1f} ms",
        f"{spread(speed.samples):.0%}{' ~' if speed.too_noisy else ''}",
        f"{speed.bytes / median / 1e9:,.1f}",
        f"{speed.flops / median / 1e9:,.1f}",
        share,
        eager,
    ]


def _write(path: Path, content: dict[str, Any]) -> None:
    from ..atomic import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show_ceilings() -> None:
    import torch

    from ..ceilings import measure

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
