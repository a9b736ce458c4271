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
    file_to_write,
    folder_to_fill,
    set_threads,
)
from .profile_code import chip_for, show_code, show_ncu
from .profile_run import Wanted, run
from .sizes import LAPTOP

LAYERS = 2

CODE = "Compiled code: nothing is run"


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
        str,
        typer.Option(
            metavar="SIZE",
            help=f"Model whose sizes are taken: 1b, 3b, 8b …; {LAPTOP} for a laptop.",
        ),
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
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="CHIP",
            help="Of sm_80, 86, 89, 90, 100, 120 or gfx942, which need not be here: registers, "
            "occupancy and instructions of each kernel, and the least time there.",
            show_default="this machine's GPU",
            rich_help_panel=CODE,
        ),
    ] = None,
    sass: Annotated[
        bool,
        typer.Option(
            "--sass",
            help="The instructions of every kernel; of an op, --arch shows them by itself.",
            rich_help_panel=CODE,
        ),
    ] = False,
    kernel: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Only kernels that have this in their name or configuration.",
            show_default="all",
            rich_help_panel=CODE,
        ),
    ] = "",
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the kernels' listings.",
            callback=folder_to_fill,
            rich_help_panel=CODE,
        ),
    ] = None,
    ncu: Annotated[
        bool,
        typer.Option(
            "--ncu",
            help="Print the command of Nsight Compute for these kernels.",
            rich_help_panel=CODE,
        ),
    ] = False,
    run_ncu: Annotated[
        bool, typer.Option("--run-ncu", help="And run it.", rich_help_panel=CODE)
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed steps.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the trace is written.",
            show_default="here, by what is profiled",
            callback=file_to_write,
        ),
    ] = None,
    bare: Annotated[
        bool,
        typer.Option(
            "--bare", help="Only run the steps, for another profiler to watch: perf, ncu."
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write every figure there.",
            callback=file_to_write,
        ),
    ] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Show where the time of a step goes.

    A table says of each op how often it was called, its time and its share of the step, what it had
    to move and compute at least, and how near that comes to the peak rates measured here.
    The rest is torch's own ops and Python. Without --model the weights are random, and of few
    layers. A trace for ui.perfetto.dev or chrome://tracing is written.

    With --arch no GPU is needed: the kernels are compiled for that chip and shown as they are.
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
    if dump is not None and arch is None and not sass:
        raise typer.BadParameter(
            "it writes compiled kernels, so say of which chip: "
            f"profile {what} --arch sm_90 --dump DIR",
            param_hint="--dump",
        )
    named = backend and backend.value
    if arch is not None or sass or ncu or run_ncu:
        if model is not None:
            raise typer.BadParameter(
                "code is compiled for sizes, not for weights. Write the size instead: --shape 8b",
                param_hint="--model",
            )
        needs = "--sass" if sass else "--ncu"
        chip = chip_for(arch, needs)
        if ncu or run_ncu:
            arguments = [*wanted.arguments, *["--backend", named] * (named is not None)]
            arguments += ["--device", "cuda", "--bare", "--repeats", "2"]
            show_ncu(wanted, chip, named, arguments, start=run_ncu)
        else:
            show_code(wanted, chip, named, sass=sass, only=kernel, dump=dump, json_file=json_file)
        return
    where = device_named(device)
    if backend is not None:
        check_backend(backend.value, where.type)
    run(
        wanted,
        where,
        named,
        repeats=repeats,
        by_shape=by_shape,
        trace=trace,
        bare=bare,
        json_file=json_file,
    )
