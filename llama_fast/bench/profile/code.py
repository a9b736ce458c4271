"""What a step would run on a chip that is not here: its calls, their least times, their kernels.

The step runs on the meta device, where tensors have shapes and no contents. Its calls are recorded
on their way through torch's dispatcher; Triton's launchers are then called for the assumed chip,
and what they launch is compiled for it. CUDA's kernels are compiled as they stand in csrc/cuda.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dispatch import OPS, Cost, DispatchMode, backends
from ...triton_kernels.chips import CHIPS, Chip, assume
from ...triton_kernels.cubin import most_threads, sass, usages
from . import cuda_code
from .calls import Step, no_section
from .instructions import Instruction, amd_class, mix, parse_amd, parse_sass, sass_class
from .limits import Limits

# Products of matrices, which matrix instructions compute.
PRODUCTS = ("linear", "attention")
OF_SHARED_MEMORY = {"LDS", "LDSM", "STS", "STSM", "LDGSTS", "SYNCS", "ATOMS", "UTMALDG", "UBLKCP"}


@dataclass
class MetaCall:
    """Calls of one op with arguments of one kind, on the meta device."""

    op: str
    args: tuple
    count: int
    cost: Cost

    @property
    def label(self) -> str:
        return OPS[self.op].label(*self.args)

    @property
    def shapes(self) -> str:
        tensors = (x for x in self.args if isinstance(x, Tensor) and x.ndim > 1)
        return ", ".join("×".join(map(str, x.shape)) for x in tensors)

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.args if isinstance(x, Tensor) and x.is_floating_point())

    def at_best(self, limits: Limits) -> tuple[float, str]:
        """Seconds of one call at the chip's published limits, and which of them bounds it."""
        product = self.op.startswith(PRODUCTS) and self.dtype is not torch.float32
        arithmetic = "bfloat16" if product else "float32"
        moving = self.cost.bytes / limits.bandwidth
        computing = self.cost.flops / getattr(limits, arithmetic)
        return (moving, "memory") if moving >= computing else (computing, arithmetic)


class _Recorder(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "llama_fast":
            op = OPS[function._opname]
            self.calls.append((op.name, op.complete(args)))
        return function(*args, **(kwargs or {}))


def record_calls(step: Step) -> list[MetaCall]:
    """Of a step whose tensors are on the meta device, in the order in which they come first."""
    recorder = _Recorder()
    with recorder:
        step(no_section)
    found: dict[tuple, MetaCall] = {}
    for op, args in recorder.calls:
        key = (op, *map(_kind, args))
        if key not in found:
            found[key] = MetaCall(op, args, 0, OPS[op].cost(*args))
        found[key].count += 1
    return list(found.values())


def _kind(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


@dataclass
class Kernel:
    """One kernel as it is compiled for a chip.

    op          that it serves
    config      its tile sizes and the like; the template's arguments for CUDA
    grid        programs that the call launches; None where that is not known
    shared      bytes of a program; `dynamic`: the launch adds more, which the code does not say
    programs    that a processor keeps at a time
    occupancy   part of the warps that a processor could keep
    """

    op: str
    backend: str
    name: str
    config: str
    grid: tuple[int, ...] | None
    warps: int
    registers: int
    spilled: int
    shared: int
    dynamic: bool
    programs: int
    occupancy: float
    text: str
    instructions: list[Instruction]
    amd: bool

    def mix(self) -> list:
        return mix(self.instructions, amd_class if self.amd else sass_class)


def triton_launches(call: MetaCall, chip: Chip) -> list[Any]:
    """What Triton's launcher would launch for a call; nothing for an op that it leaves to torch."""
    from ...triton_kernels.launch import record

    implementation = backends()["triton"].implementations.get(call.op)
    if implementation is None:
        return []
    with torch.no_grad(), assume(chip), record() as launches:
        implementation.launch(*call.args)
    return launches


def triton_kernels(call: MetaCall, chip: Chip) -> Iterator[Kernel]:
    """Compiles them: seconds each, once; later Triton's cache has them."""
    from ...triton_kernels import aot

    for launch in triton_launches(call, chip):
        compiled = aot.compile_for(chip, launch)
        found = aot.resources(chip, launch, compiled)
        if chip.amd:
            text = compiled.asm["amdgcn"]
            instructions = parse_amd(text)
        else:
            with aot.cubin_of(compiled) as file:
                (text,) = sass(file).values()
            instructions = parse_sass(text)
        warps = compiled.metadata.num_warps
        yield Kernel(
            op=call.label,
            backend="triton",
            name=launch.kernel.__name__,
            config=found.config.partition(" num_warps=")[0],
            grid=launch.grid,
            warps=warps,
            registers=found.registers,
            spilled=found.spilled,
            shared=found.shared,
            dynamic=False,
            programs=found.occupancy,
            occupancy=found.occupancy * warps / chip.warps,
            text=text,
            instructions=instructions,
            amd=chip.amd,
        )


def cuda_kernels(call: MetaCall, chip: Chip) -> Iterator[Kernel]:
    """Those that csrc/cuda has for the op, its pass and dtype: the launch chooses one of them."""
    source = cuda_code.source_of(call.label)
    names = cuda_code.kernel_names(call.label)
    if source is None or not names or chip.amd:
        return
    file = cuda_code.cubin(source, architecture(chip))
    texts, threads = sass(file), most_threads(file)
    wanted = [usage for usage in usages(file) if _fits(usage.name, names, call.dtype)]
    readable = cuda_code.readable([usage.name for usage in wanted])
    for usage in wanted:
        instructions = parse_sass(texts[usage.name])
        warps = -(-threads[usage.name] // chip.warp)
        opcodes = {instruction.opcode.split(".")[0] for instruction in instructions}
        spills = opcodes & {"STL", "LDL"}
        # Later tools count in what the system itself takes, which Chip.programs adds.
        shared = max(0, usage.shared - (1024 if chip.arch >= 90 else 0))
        programs = chip.programs(usage.registers, warps, shared)
        name, _, config = readable[usage.name].partition("<")
        yield Kernel(
            op=call.label,
            backend="cuda",
            name=name,
            config=f"<{config}" if config else "",
            grid=None,
            warps=warps,
            registers=usage.registers,
            spilled=max(usage.stack, usage.local) if spills else 0,
            shared=shared,
            dynamic=bool(opcodes & OF_SHARED_MEMORY) and not shared,
            programs=programs,
            occupancy=programs * warps / chip.warps,
            text=texts[usage.name],
            instructions=instructions,
            amd=False,
        )


def _fits(mangled: str, names: list[str], dtype: torch.dtype) -> bool:
    if not any(f"{len(name)}{name}" in mangled for name in names):
        return False
    own = cuda_code.MANGLED.get(dtype)
    if own is not None:
        return own in mangled
    return not any(other in mangled for other in cuda_code.MANGLED.values())


def architecture(chip: Chip) -> str:
    """As nvcc and setup_cuda.py name it: 90a has Hopper's own instructions."""
    return "90a" if chip.arch == 90 else str(chip.arch)


def chip_named(name: str) -> Chip | None:
    """sm_90, sm_90a, 90 and gfx942 are names; None for what is no known chip."""
    plain = name if name in CHIPS else f"sm_{name.removeprefix('sm_').rstrip('af')}"
    return CHIPS.get(plain)


COMPILERS: dict[str, Callable[[MetaCall, Chip], Iterator[Kernel]]] = {
    "triton": triton_kernels,
    "cuda": cuda_kernels,
}
