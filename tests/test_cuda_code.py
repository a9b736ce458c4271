"""What nvcc makes of the kernels, read from the compiled module: registers, spills, shared memory
and matrix instructions of every kernel for every architecture that is tested here."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .test_cuda import ROOT, setup_cuda

ARCHITECTURES = ["80", "90a"]
NVCC = setup_cuda.find_nvcc()


def find_cuobjdump() -> Path | None:
    """cuobjdump of the toolkit, or the one that Triton brings along."""
    beside = [NVCC.resolve().parent / "cuobjdump"] if NVCC else []
    if triton := importlib.util.find_spec("triton"):
        beside.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found := shutil.which("cuobjdump"):
        beside.insert(0, Path(found))
    return next((path for path in beside if path.is_file()), None)


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="this needs nvcc, of a CUDA toolkit")
CUOBJDUMP = find_cuobjdump()
needs_cuobjdump = pytest.mark.skipif(
    NVCC is None or CUOBJDUMP is None, reason="this needs nvcc and cuobjdump, of a CUDA toolkit"
)


class Kernel(NamedTuple):
    """One kernel's code for one architecture."""

    architecture: str
    name: str  # mangled
    registers: int
    stack: int  # bytes of local memory of a thread: spills, or arrays that are no registers
    shared: int


@functools.cache
def build() -> Path:
    folder = ROOT / "build" / "cuda-code"
    target = folder / "_cuda.so"
    setup_cuda.build_cuda_module(target, folder, ARCHITECTURES)
    return target


def dump(*options: str) -> str:
    command = [CUOBJDUMP, *options, build()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels() -> list[Kernel]:
    found = []
    for part in dump("--dump-resource-usage").split("\narch = ")[1:]:
        architecture = re.match(r"sm_(\w+)", part)[1]
        for name, usage in re.findall(r"Function (\S+):\n\s*(.*)", part):
            count = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            found.append(Kernel(architecture, name, count["REG"], count["STACK"], count["SHARED"]))
    return found


@needs_nvcc
def test_it_builds_and_imports_without_a_gpu():
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.architectures(), module.device_type(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(build())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [",".join(ARCHITECTURES), "cuda", "False"], done.stderr


@needs_cuobjdump
def test_every_kernel_is_there_for_every_architecture():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    names = set(re.findall(r"(\w+_kernel)\(", sources))
    assert "linear_fwd_kernel" in names
    for architecture in ARCHITECTURES:
        compiled = " ".join(k.name for k in kernels() if k.architecture == architecture)
        missing = [name for name in names if name not in compiled]
        assert not missing, f"sm_{architecture} lacks {missing}"


@needs_cuobjdump
def test_no_kernel_spills():
    spilling = [kernel for kernel in kernels() if kernel.stack]
    assert not spilling, "\n".join(map(str, spilling))


@functools.cache
def instructions() -> dict[str, list[str]]:
    """Every kernel's instructions, of all its instances and architectures together."""
    found: dict[str, list[str]] = {}
    for function in dump("-sass").split("Function : ")[1:]:
        mangled, _, code = function.partition("\n")
        name = re.search(r"\d([a-z_]+?)_kernel", mangled)[1]
        found.setdefault(name, []).extend(re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code))
    return found


@needs_cuobjdump
def test_matrix_instructions_are_where_they_should_be():
    def kernels_with(pattern: str) -> set[str]:
        return {
            name
            for name, codes in instructions().items()
            if any(re.match(pattern, code) for code in codes)
        }

    assert kernels_with("HMMA") == {"linear_fwd", "attention_few", "attention_many"}
    assert kernels_with("HGMMA") == kernels_with("UTMALDG") == {"attention_warpgroups"}


@needs_cuobjdump
def test_products_of_warpgroups_are_not_serialised():
    """Where ptxas cannot follow the registers of a product, it waits behind each: there would be
    more waits than the source has, four in each instance."""
    codes = instructions()["attention_warpgroups"]
    instances = codes.count("USETMAXREG.DEALLOC.CTAPOOL")
    assert instances == 4  # two dtypes, two head dims
    assert sum(code.startswith("WARPGROUP.DEPBAR") for code in codes) == 4 * instances
