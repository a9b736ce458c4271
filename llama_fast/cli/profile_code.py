"""What `llama-fast profile` shows of compiled code: `--arch`, `--sass` and `--ncu`."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import BackendError
from ..utils.environment import triton_interpreter
from ..utils.files import atomic_file, make_folder
from .terminal import columns, note, show, size, table
from .units import count, duration, write_json

if TYPE_CHECKING:
    from ..bench.profile.code import Kernel, MetaCall
    from ..bench.profile.limits import Limits
    from ..triton_kernels.chips import Chip
    from .profile_run import Wanted

FORMS = 4  # of a class that are named


def chip_for(arch: str | None, needs: str) -> Chip:
    """Returns the chip of --arch, or the GPU that is here. Raises BackendError for one that is not
    known."""
    import torch

    from ..bench.profile.code import CHIPS, chip_named

    if arch is None:
        if not torch.cuda.is_available():
            raise typer.BadParameter(
                f"{needs} compiles for a chip, and no GPU is here to take it from. Write: --arch "
                f"and one of {', '.join(CHIPS)}",
                param_hint="--arch",
            )
        if torch.version.hip:
            arch = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
        else:
            arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    chip = chip_named(arch)
    if chip is None:
        raise BackendError(f"there is no chip {arch!r}; write one of {', '.join(CHIPS)}")
    return chip


def calls_of(wanted: Wanted) -> tuple[list[MetaCall], str]:
    """Returns the calls of the step on the meta device, recorded and not run, and its title."""
    import torch

    from ..bench.profile.code import record_calls

    prepared = wanted.step(torch.device("meta"))
    return record_calls(prepared.step), prepared.title


def show_code(
    wanted: Wanted,
    chip: Chip,
    backend: str | None,
    *,
    sass: bool,
    only: str,
    dump: Path | None,
    json_file: Path | None,
) -> None:
    """only: part of the name or the configuration of the kernels that are shown."""
    from ..bench.profile.limits import LIMITS

    if backend in ("cpu", "eager"):
        raise typer.BadParameter(
            f"{backend} has no code for {chip.name}; triton and cuda have. "
            "Write: --backend triton, or cuda",
            param_hint="--backend",
        )
    calls, title = calls_of(wanted)
    limits = LIMITS[chip.name]
    show(f"{title}, for {chip.name}: {wanted.amount}")
    _show_least(calls, limits, wanted)
    kernels = [
        kernel
        for kernel in _compile(calls, chip, backend)
        if only in f"{kernel.backend} {kernel.name} {kernel.config}"
    ]
    if only and not kernels:
        raise BackendError(f"no kernel of this step has {only!r} in its name or configuration")
    _show_resources(kernels, chip)
    if sass or wanted.is_op:
        for kernel in kernels:
            _show_mix(kernel)
    if dump is not None:
        _dump(kernels, chip, dump)
    if json_file is not None:
        write_json(json_file, {
            "profile": title,
            "chip": asdict(chip),
            "limits": asdict(limits),
            "calls": [_call_record(call, limits) for call in calls],
            "kernels": [_kernel_record(kernel) for kernel in kernels],
        })  # fmt: skip


def _show_least(calls: list[MetaCall], limits: Limits, wanted: Wanted) -> None:
    wide = columns() >= 100
    rows = table("op", "calls", "bytes", "FLOPs", *["FLOP/byte"] * wide, "at best", "bound by",
                 numbers=True)  # fmt: skip
    total = 0.0
    for call in calls:
        seconds, bound = call.at_best(limits)
        total += call.count * seconds
        rows.add_row(
            f"{call.label} {call.shapes}",
            f"{call.count}",
            size(call.count * call.cost.bytes),
            count(call.count * call.cost.flops),
            *[f"{call.cost.flops / call.cost.bytes:,.1f}"] * wide,
            duration(call.count * seconds),
            bound,
        )
    show(rows)
    text = f"At best, {duration(total)} in all"
    if not wanted.is_op:
        text += f": {wanted.batch * wanted.tokens / total:,.1f} tokens a second"
    show(
        f"{text}. Limits of the {limits.product}: {limits.bandwidth / 1e9:,.0f} GB/s, bfloat16 "
        f"{limits.bfloat16 / 1e12:,.1f} TFLOP/s, float32 {limits.float32 / 1e12:,.1f} TFLOP/s "
        f"({limits.source}); time between kernels comes on top"
    )


def _compile(calls: list[MetaCall], chip: Chip, backend: str | None) -> list[Kernel]:
    """Each kernel once; why there is none of a backend is a note, or an error where that backend
    was asked for."""
    from ..bench.profile.code import COMPILERS

    found: dict[tuple, Kernel] = {}
    for name, compiler in COMPILERS.items():
        if backend not in (None, name):
            continue
        if reason := _why_not(name, chip):
            if backend == name:
                raise BackendError(reason)
            note(f"No {name} kernels: {reason}")
            continue
        try:
            for call in calls:
                for kernel in compiler(call, chip):
                    found.setdefault((name, kernel.op, kernel.text), kernel)
        except BackendError as error:
            if backend == name:
                raise
            note(f"No {name} kernels: {error}")
    compiled = {kernel.op for kernel in found.values()}
    if left := sorted({call.label for call in calls} - compiled):
        note(
            f"No kernels: {', '.join(left)}; torch's libraries or eager code serve them, or a "
            "backend that is not shown"
        )
    return list(found.values())


def _why_not(backend: str, chip: Chip) -> str:
    from ..bench.profile.cuda_code import why_not
    from ..triton_kernels.cubin import find_tool

    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux: pip install triton"
    if backend == "triton" and triton_interpreter():
        return "TRITON_INTERPRET is set, so nothing can be compiled: unset it"
    if backend == "cuda" and chip.amd:
        return f"{chip.name} is AMD's"
    if backend == "cuda" and (reason := why_not()):
        return reason
    if not chip.amd and find_tool("cuobjdump") is None:
        return "no cuobjdump was found: it comes with a CUDA toolkit and with Triton"
    return ""


def _show_resources(kernels: list[Kernel], chip: Chip) -> None:
    for backend in dict.fromkeys(kernel.backend for kernel in kernels):
        some = [kernel for kernel in kernels if kernel.backend == backend]
        launched = any(kernel.grid is not None for kernel in some)
        rows = table(f"{backend} kernel", *["programs"] * launched, "warps", "regs", "spilled",
                     "shared", "fit", "occupancy", numbers=True)  # fmt: skip
        for kernel in some:
            rows.add_row(*_cells(kernel))
        show(rows)
    if kernels:
        show(
            "Programs of the launch; warps of a program; registers and spilled bytes of a thread; "
            f"shared memory of a program, {chip.shared_memory:,} bytes at most; programs that fit "
            f"one of {chip.processors} processors, and the part of its warps that they are. "
            "≤: before the shared memory that the launch adds"
        )


def _cells(kernel: Kernel) -> list[str]:
    most = "≤ " if kernel.dynamic else ""
    return [
        f"{_short(kernel)} {kernel.config}",
        *([] if kernel.grid is None else [f"{math.prod(kernel.grid):,}"]),
        f"{kernel.warps}",
        f"{kernel.registers}",
        f"{kernel.spilled}",
        "dynamic" if kernel.dynamic else f"{kernel.shared:,}",
        f"{most}{kernel.programs}",
        f"{most}{kernel.occupancy:.0%}",
    ]


def _short(kernel: Kernel) -> str:
    return kernel.name.removesuffix("_kernel")


def _show_mix(kernel: Kernel) -> None:
    found = kernel.mix()
    total = sum(one.count for one in found)
    rows = table(f"{_short(kernel)} {kernel.config}", "count", "in loops", numbers=True)
    rows.add_column("which")
    for one in found:
        forms = [f"{name} ×{number}" for name, number in one.forms.most_common(FORMS)]
        more = len(one.forms) - FORMS
        forms += [f"{more} more"] * (more > 0)
        rows.add_row(one.name, f"{one.count}", f"{one.in_loops}", ", ".join(forms))
    rows.add_row("all", f"{total}", f"{sum(one.in_loops for one in found)}")
    show(rows)


def _dump(kernels: list[Kernel], chip: Chip, folder: Path) -> None:
    make_folder(folder)
    for number, kernel in enumerate(kernels):
        words = re.sub(r"[^A-Za-z0-9]+", "-", f"{kernel.name} {kernel.config}").strip("-")
        suffix = "s" if kernel.amd else "sass"
        file = folder / f"{number:02d}-{kernel.backend}-{words}.{chip.name}.{suffix}"
        with atomic_file(file) as partial:
            partial.write_text(kernel.text, encoding="utf-8")
    show(f"{len(kernels)} listings: {folder}")


def _call_record(call: MetaCall, limits: Limits) -> dict[str, Any]:
    seconds, bound = call.at_best(limits)
    return {
        "op": call.label,
        "shapes": call.shapes,
        "calls": call.count,
        **call.cost._asdict(),
        "at_best": seconds,
        "bound": bound,
    }


def _kernel_record(kernel: Kernel) -> dict[str, Any]:
    kept = {name: value for name, value in vars(kernel).items()
            if name not in ("text", "instructions", "amd")}  # fmt: skip
    mix = [{**asdict(one), "forms": dict(one.forms)} for one in kernel.mix()]
    return {**kept, "mix": mix}


def show_ncu(wanted: Wanted, chip: Chip, backend: str | None, arguments: list[str],
             *, start: bool) -> None:  # fmt: skip
    """Prints the ncu command of the step, and with `start` runs it.

    arguments  of `llama-fast profile`, that make the step
    """
    from ..bench.profile import ncu
    from ..bench.profile.code import PRODUCTS, cuda_code, triton_launches

    if chip.amd:
        raise BackendError(f"ncu is of NVIDIA's chips, and {chip.name} is AMD's")
    calls, _ = calls_of(wanted)
    names: list[str] = []
    launches = 0
    if backend in (None, "triton") and not _why_not("triton", chip):
        for call in calls:
            found = [launch.kernel.__name__ for launch in triton_launches(call, chip)]
            names += found
            launches += call.count * len(found)
    if backend in (None, "cuda"):
        of_cuda = [(call, cuda_code.kernel_names(call.label)) for call in calls]
        names += [name for _, found in of_cuda for name in found]
        launches = max(launches, sum(call.count for call, found in of_cuda if found))
    if not names:
        raise BackendError(
            f"no kernels of {backend or 'ours'} are known here for {wanted.what}: it needs Triton "
            "(not its interpreter), or a checkout with csrc/cuda"
        )
    products = any(call.op.startswith(PRODUCTS) for call in calls)
    program = [sys.executable, "-m", "llama_fast", "profile", *arguments]
    made = ncu.command(program, names, products=products, skip=launches, report=wanted.stem)
    show(shlex.join(made))
    if not start:
        return
    tool = ncu.find_ncu()
    if tool is None:
        raise BackendError(
            "no ncu was found: it is part of Nsight Compute, which a CUDA toolkit brings along "
            "(apt-get install nsight-compute); put it on PATH, or run the command where it is"
        )
    done = subprocess.run([tool, *made[1:]])
    if done.returncode:
        raise BackendError(
            f"ncu ended with {done.returncode}; where it says ERR_NVGPUCTRPERM, the driver lets "
            "only root count: run it with sudo, or load the nvidia module with "
            "NVreg_RestrictProfilingToAdminUsers=0"
        )
    show(f"Report: {wanted.stem}.ncu-rep, for ncu-ui or ncu --import")
