"""`llama-fast doctor --resources`: what each Triton kernel takes of each chip, none at hand."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from ..errors import BackendError
from ..utils.environment import triton_interpreter
from .terminal import note, show, table

if TYPE_CHECKING:
    from ..triton_kernels.aot import Resources
    from ..triton_kernels.launch import Launch

COLUMNS = ("kernel", "configuration", "registers", "spilled", "shared", "programs", "", "compiled")


def show_resources(arch: str | None = None) -> list[str]:
    """Shows a table for each chip; returns what no configuration that ships may do.

    arch  "sm_90,gfx942": these chips only, all when None
    Raises BackendError for a chip that is not known, and where nothing can be compiled.
    """
    if not importlib.util.find_spec("triton"):
        return ["Triton is not installed, so its kernels cannot be compiled; pip install triton"]
    if triton_interpreter():
        raise BackendError("TRITON_INTERPRET is set, so nothing can be compiled: unset it")
    from ..triton_kernels.aot import problems
    from ..triton_kernels.chips import CHIPS

    chips = list(CHIPS) if arch is None else arch.split(",")
    if unknown := [chip for chip in chips if chip not in CHIPS]:
        raise BackendError(f"no chip {', '.join(unknown)}; there are {', '.join(CHIPS)}")
    found = []
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=spawn) as pool:
        work = {
            chip: [pool.submit(_compile, chip, index) for index in range(count)]
            for chip, count in zip(chips, pool.map(_count, chips), strict=True)
        }
        for done, (chip, kernels) in enumerate(work.items(), 1):
            lines = table(*COLUMNS)
            rows = [kernel.result() for kernel in kernels]
            for row, seconds in rows:
                lines.add_row(
                    row.kernel,
                    row.config,
                    str(row.registers),
                    str(row.spilled),
                    f"{row.shared:,}",
                    str(row.occupancy),
                    row.matrix,
                    f"{seconds:.1f} s",
                )
                found += problems(row)
            show(f"Triton kernels on {chip}: registers and spilled bytes of a thread", lines)
            times = [seconds for _, seconds in rows]
            show(
                f"The first call of a kernel compiles it: {min(times):.1f} to {max(times):.1f} s "
                f"here, {sum(times):.0f} s for all {len(times)}; later calls and processes find "
                "it in Triton's cache."
            )
            note(f"{done} of {len(work)} chips after {time.monotonic() - start:.0f} s")
    return found


@functools.cache
def _launches(chip: str) -> list[Launch]:
    from ..triton_kernels.aot import launches
    from ..triton_kernels.chips import CHIPS

    return launches(CHIPS[chip])


def _count(chip: str) -> int:
    return len(_launches(chip))


def _compile(chip: str, index: int) -> tuple[Resources, float]:
    """Returns what a kernel takes, and the seconds that it took to compile."""
    import triton

    from ..triton_kernels.aot import compile_for, resources
    from ..triton_kernels.chips import CHIPS

    triton.knobs.compilation.always_compile = True  # a kernel of the cache would take no time
    launch = _launches(chip)[index]
    start = time.monotonic()
    compiled = compile_for(CHIPS[chip], launch)
    seconds = time.monotonic() - start
    return resources(CHIPS[chip], launch, compiled), seconds
