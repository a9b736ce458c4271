"""`llama-fast doctor --resources`: what each Triton kernel takes of each chip, none at hand."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from ..environment import triton_interpreter
from ..errors import BackendError
from .terminal import show, table

if TYPE_CHECKING:
    from ..triton_kernels.aot import Resources


def show_resources() -> list[str]:
    """Shows a table for each chip; returns what no configuration that ships may do."""
    if not importlib.util.find_spec("triton"):
        return ["Triton is not installed, so its kernels cannot be compiled; pip install triton"]
    if triton_interpreter():
        raise BackendError("TRITON_INTERPRET is set, so nothing can be compiled: unset it")
    from ..triton_kernels.aot import problems
    from ..triton_kernels.chips import CHIPS

    found = []
    workers = min(os.cpu_count() or 1, len(CHIPS))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for chip, rows in zip(CHIPS, pool.map(_of_chip, CHIPS), strict=True):
            lines = table(
                "kernel", "configuration", "registers", "spilled", "shared", "programs", ""
            )
            for row in rows:
                lines.add_row(
                    row.kernel,
                    row.config,
                    str(row.registers),
                    str(row.spilled),
                    f"{row.shared:,}",
                    str(row.occupancy),
                    row.matrix,
                )
                found += problems(row)
            show(f"Triton kernels on {chip}: registers and spilled bytes of a thread", lines)
    return found


def _of_chip(name: str) -> list[Resources]:
    from ..triton_kernels.aot import launches, resources
    from ..triton_kernels.chips import CHIPS

    return [resources(CHIPS[name], launch) for launch in launches(CHIPS[name])]
