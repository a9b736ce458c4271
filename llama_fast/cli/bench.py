"""`llama-fast bench`: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Debug, Threads, example, set_threads
from .terminal import show, table


@example("llama-fast bench --ceilings")
def bench(
    ceilings: Annotated[
        bool,
        typer.Option(
            "--ceilings",
            help="Measure memory bandwidth and arithmetic, which bound every kernel's speed.",
        ),
    ] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Measure this machine's ceilings: the speed that no kernel can pass."""
    if not ceilings:
        raise typer.BadParameter("say what to measure: --ceilings")
    import torch

    from ..ceilings import measure

    set_threads(threads)
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
