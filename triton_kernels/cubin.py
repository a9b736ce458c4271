"""What NVIDIA's tools say of compiled code: registers, memory and instructions of each kernel.

The tools are those on PATH, those of a CUDA toolkit, or the ones that Triton brings along.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What a kernel takes on one architecture ("90a"). `stack` and `local`: bytes of local memory
    of a thread, for spills and for arrays that are no registers; `shared`: bytes of a block,
    without what a launch adds."""

    architecture: str
    name: str  # mangled
    registers: int
    stack: int
    local: int
    shared: int


@functools.cache
def find_tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit on PATH, of the one whose nvcc is on PATH, or of Triton."""
    if found := shutil.which(name):
        return Path(found)
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((path for path in (folder / name for folder in folders) if path.is_file()), None)


def cuobjdump(file: Path, *options: str) -> str:
    """Raises FileNotFoundError where there is no such tool."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError(
            "no cuobjdump was found: it comes with a CUDA toolkit, and with Triton (pip install "
            "triton)"
        )
    command = [tool, *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usages(file: Path) -> list[Usage]:
    """Of every kernel in a cubin, or in a module that holds some."""
    found = []
    said = cuobjdump(file, "--dump-resource-usage")
    # A module says for each part which architecture it is for; a cubin does not.
    parts = said.split("\narch = ")[1:] or [said]
    for part in parts:
        stated = re.match(r"sm_(\w+)", part)
        architecture = stated[1] if stated else _architecture(file)
        for name, usage in re.findall(r"Function (\S+):\n\s*(.*)", part):
            count = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            fields = (count[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
            found.append(Usage(architecture, name, *fields))
    return found


def sass(file: Path) -> dict[str, str]:
    """The instructions of every kernel in a cubin, by its mangled name."""
    return dict(listings(file))


def listings(file: Path) -> list[tuple[str, str]]:
    """(mangled name, instructions) of every kernel in a cubin, or in a module that holds some: one
    for each architecture."""
    parts = cuobjdump(file, "-sass").split("Function : ")[1:]
    return [(part.split(None, 1)[0], part.partition("\n")[2]) for part in parts]


def most_threads(file: Path) -> dict[str, int]:
    """Threads that a block of each kernel has at most, as its launch bounds say."""
    found = {}
    for part in _elf(file).split("\n.nv.info.")[1:]:
        name, _, text = part.partition("\n")
        bound = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s*(.*)", text.split("\n.", 1)[0]
        )
        if bound:
            x, y, z = (int(number, 16) for number in bound[1].split()[:3])
            found[name.strip()] = x * y * z
    return found


@functools.cache
def _elf(file: Path) -> str:
    return cuobjdump(file, "-elf")


def _architecture(file: Path) -> str:
    return re.search(r"\bsm=(\w+)", _elf(file))[1]
