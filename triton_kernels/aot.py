"""Compiles every kernel in every configuration that ships, for chips that need not be here.

The launchers are called on tensors of the meta device, with the shapes of the published models, for
an assumed chip: what they would launch is compiled for that chip, and its registers, spills, shared
memory and matrix instructions are read from the result.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .chips import CHIPS, Chip, assume
from .cubin import sass, usages
from .launch import TYPES, Launch, record
from .shapes import MODELS

MATRIX = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Resources:
    """What a program of a kernel takes of a chip. `registers` of a thread, `spilled` bytes of a
    thread, `shared` bytes, `matrix` the instruction found, or nothing; `occupancy` an estimate:
    programs that a processor holds."""

    chip: str
    kernel: str
    config: str
    registers: int
    spilled: int
    shared: int
    matrix: str
    occupancy: int


def calls(brief: bool = False) -> Iterator[tuple[str, str, tuple]]:
    """(stem, launcher, arguments) that cover the configurations, as `shapes.py` says. `brief`: of
    the 8B model alone."""
    models = [MODELS["8b"]] if brief else list(MODELS.values())
    for found in iter_modules([str(Path(__file__).parent)]):
        module = import_module(f".{found.name}", __package__)
        if hasattr(module, "aot_calls"):
            for launcher, args in module.aot_calls(models, brief):
                yield found.name, launcher, args


def launches(chip: Chip, stems: tuple[str, ...] = (), brief: bool = False) -> list[Launch]:
    """What the calls would launch on `chip`, each configuration once."""
    found = {}
    with assume(chip):
        for stem, launcher, args in calls(brief):
            if not stems or stem in stems:
                module = import_module(f".{stem}", __package__)
                with record() as recorded:
                    getattr(module, launcher)(*args)
                for launch in recorded:
                    found.setdefault(str(specialise(launch)) + str(launch.options), launch)
    return list(found.values())


def specialise(launch: Launch) -> tuple[str, dict, dict, dict]:
    """(kernel, signature, constants, attributes) as Triton makes them of a call's arguments: an
    argument that is 1 is a constant, and one that 16 divides is known to be, unless the kernel
    says that it is a size like any other."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    values |= {name: launch.options[name] for name in names if name in launch.options}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        divisible, special = False, not launch.kernel.params[index].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name], divisible = "*" + TYPES[value.dtype], True
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif (
            name in launch.options
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = special and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return launch.kernel.__name__, signature, constants, attributes


def compile_for(chip: Chip, launch: Launch) -> Any:
    """Triton's compiled kernel."""
    _, signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("hip" if chip.amd else "cuda", chip.arch, chip.warp)
    options = {name: launch.options[name] for name in ("num_warps", "num_stages") if name in
               launch.options}  # fmt: skip
    options["enable_fp_fusion"] = True  # as launch() does
    return triton.compile(source, target=target, options=options)


def resources(chip: Chip, launch: Launch, compiled: Any = None) -> Resources:
    """Compiles what would be launched, unless it is given, and reads what it takes."""
    compiled = compiled or compile_for(chip, launch)
    if chip.amd:
        text = compiled.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

        registers = count("vgpr_count") + count("agpr_count")
        spilled = 4 * (count("vgpr_spill_count") + count("sgpr_spill_count"))
        spilled = max(spilled, count("private_segment_fixed_size"))
    else:
        text = compiled.asm["ptx"]
        with cubin_of(compiled) as file:
            (usage,), (code,) = usages(file), sass(file).values()
        # A stack alone is no spill: the alignment of frames may leave one that nothing uses.
        spills = re.search(r"\bSTL\b", code) is not None
        registers, spilled = usage.registers, max(usage.stack, usage.local) * spills
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    dtype = next((TYPES[a.dtype] for a in launch.args if isinstance(a, torch.Tensor)), "")
    named = {n: v for n, v in launch.options.items() if n.startswith("BLOCK") or n == "num_warps"}
    config = " ".join(f"{name.lower().removeprefix('block_')}={v}" for name, v in named.items())
    return Resources(
        chip.name,
        launch.kernel.__name__.removesuffix("_kernel"),
        f"{dtype} {config}",
        registers,
        spilled,
        shared,
        next((name for name in MATRIX if name in text), ""),
        chip.programs(registers, warps, shared),
    )


@contextmanager
def cubin_of(compiled: Any) -> Iterator[Path]:
    """The code that Triton compiled for an NVIDIA chip, as a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        yield file


def problems(row: Resources) -> list[str]:
    """What forbids to ship it."""
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes a thread")
    if row.shared > CHIPS[row.chip].shared_memory:
        found.append(
            f"takes {row.shared} bytes of shared memory, of {CHIPS[row.chip].shared_memory}"
        )
    products = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dk_dv")
    if row.kernel in products and not row.config.startswith("fp32") and not row.matrix:
        found.append("multiplies without matrix instructions")
    return [f"{row.chip} {row.kernel} {row.config}: {text}" for text in found]
