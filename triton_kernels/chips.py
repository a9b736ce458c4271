"""What a launch configuration asks of the chip it is for."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Chip:
    """`arch` is what Triton calls it: 90 for sm_90, "gfx942" for an AMD chip.

    processors     streaming multiprocessors or compute units
    shared_memory  bytes that one program may use of it
    registers      32-bit registers of a processor; `warps` it keeps at most
    blocks         programs that a processor keeps at most
    warp           threads that run in step
    device         the name in files of measured configurations; none for a chip that is not here
    """

    name: str
    arch: int | str
    processors: int
    shared_memory: int
    warp: int = 32
    registers: int = 65536
    warps: int = 64
    device: str = ""
    blocks: int = 32

    def programs(self, registers: int, warps: int, shared: int) -> int:
        """How many programs a processor keeps at a time, of `warps` warps whose threads take
        `registers` registers, and of `shared` bytes of shared memory each.

        Registers are given out by eights to a thread; NVIDIA keeps a kB of shared memory of each
        program for itself (CUDA C++ Programming Guide, "Compute Capabilities").
        """
        reserved = 0 if self.amd else KB
        of_a_program = 8 * -(-max(registers, 1) // 8) * self.warp * warps
        return min(
            self.blocks,
            self.warps // warps,
            self.registers // of_a_program,
            (self.shared_memory + reserved) // (shared + reserved or 1),
        )

    @property
    def amd(self) -> bool:
        return isinstance(self.arch, str)

    @property
    def hopper(self) -> bool:
        """Hopper's and Blackwell's data centre chips: matrix instructions of four warps together,
        which read their right side from shared memory and so leave registers free."""
        return not self.amd and self.roomy and self.arch >= 90

    @property
    def roomy(self) -> bool:
        """Whether it has the shared memory of a data centre's chip; consumer cards have 99 kB."""
        return self.amd or self.shared_memory > 160 * 1024


KB = 1024
# One chip for each architecture that the kernels are compiled for: NVIDIA, "CUDA C++ Programming
# Guide", table of technical specifications; AMD, "CDNA 3 white paper".
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 80, 108, 163 * KB),  # A100
        Chip("sm_86", 86, 84, 99 * KB, warps=48, blocks=16),  # RTX 3090
        Chip("sm_89", 89, 128, 99 * KB, warps=48, blocks=24),  # RTX 4090
        Chip("sm_90", 90, 132, 227 * KB),  # H100, H200
        Chip("sm_100", 100, 148, 227 * KB),  # B200
        Chip("sm_120", 120, 170, 99 * KB, warps=48, blocks=24),  # RTX 5090
        Chip("gfx942", "gfx942", 304, 64 * KB, warp=64, registers=131072, warps=32),  # MI300X
    )
}
# Few processors, so that the interpreter has few programs to run.
INTERPRETER = Chip("interpreter", 80, 8, 163 * KB)

_assumed: Chip | None = None


def chip_of(x: torch.Tensor) -> Chip:
    """The chip that will run a kernel on `x`."""
    if _assumed is not None:
        return _assumed
    return chip_of_device(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def chip_of_device(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        chip = Chip(arch, arch, found.multi_processor_count, 64 * KB, found.warp_size)
        return replace(chip, device=slug(found.name))
    arch = found.major * 10 + found.minor
    return Chip(
        f"sm_{arch}",
        arch,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 99 * KB),
        device=slug(found.name),
    )


def slug(device: str) -> str:
    """A device's name as files have it: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Inside the block, launch configurations are those of `chip`, whatever is there."""
    global _assumed
    before, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = before
