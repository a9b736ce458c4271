"""`llama-fast profile`: where the time of a step goes, op by op."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Backend,
    Debug,
    Device,
    DType,
    Named,
    Threads,
    check_backend,
    device_named,
    example,
    set_threads,
)
from .profile_run import Wanted, run

LAYERS = 2


@example("llama-fast profile decode --shape 8b --quantize int4")
def profile(
    what: Annotated[
        str,
        typer.Argument(
            metavar="decode|prefill|train|OP",
            help="A step of a whole model, or the calls of one op at a model's sizes.",
        ),
    ],
    shape: Annotated[
        str, typer.Option(metavar="SIZE", help="Model whose sizes are taken: 1b, 3b, 8b …")
    ] = "1b",
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Of the model.",
            show_default="2 of a size, all of a checkpoint",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            metavar="DIR",
            help="A checkpoint, all of it, in place of random weights of --shape.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at a time.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="New tokens of each.",
            show_default="512 in prefill, 256 in train, 1 elsewhere",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Tokens that came before them.",
            show_default="1024 for one token, 0 for more",
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of the tensors.", show_default="bfloat16; a checkpoint's own"),
    ] = None,
    quantize: Annotated[Named | None, typer.Option(help="Weights as integers.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Of an op: its gradient too.")
    ] = False,
    device: Device = "auto",
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="Ask this backend first, and of an op nothing else.", show_default="the fastest"
        ),
    ] = None,
    by_shape: Annotated[
        bool, typer.Option("--by-shape", help="A row for each kind of call, with its shapes.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed steps.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the trace is written.",
            show_default="llama-fast-WHAT-SHAPE.trace.json",
        ),
    ] = None,
    bare: Annotated[
        bool,
        typer.Option(
            "--bare", help="Only run the steps, for another profiler to watch: perf, ncu."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure there.")
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Show where the time of a step goes.

    A table says of each op how often it was called, its time and its share of the step, what it had
    to move and compute at least, and how near that comes to the ceilings measured on this machine.
    The rest is torch's own ops and Python. Without --model the weights are random, and of few
    layers. A trace for ui.perfetto.dev or chrome://tracing is written.
    """
    set_threads(threads)
    wanted = Wanted(
        what=what,
        shape=shape,
        layers=layers,
        model=model,
        batch=batch,
        tokens=tokens,
        context=context,
        dtype=dtype and dtype.torch,
        quantize=quantize and quantize.value,
        backward=backward,
    )
    wanted.check()
    where = device_named(device)
    if backend is not None:
        check_backend(backend.value, where.type)
    run(
        wanted,
        where,
        backend and backend.value,
        repeats=repeats,
        by_shape=by_shape,
        trace=trace,
        bare=bare,
        json_file=json_file,
    )
