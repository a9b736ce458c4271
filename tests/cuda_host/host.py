"""The CUDA kernels run without a GPU: csrc/cuda/*.cu compiled by the host's compiler against the
headers beside this file, as a module that stands for `llama_fast._cuda` and takes CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from filelock import FileLock

from llama_fast.backends import cuda
from llama_fast.dispatch import register_backend

from ..cpu_host.emulation import load_module, setup

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CXX = sysconfig.get_config_var("CXX").split()[0]
CXX_FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wno-unknown-pragmas"

HOST_ARCHITECTURE = "'-DLLAMA_FAST_CUDA_ARCHITECTURES=\"host\"'"

# How the module can be built: flags of the kernels, of the rest, of the link.
RACES = "races"
ADDRESS = "address"
# Of the kernels -O1 takes more time to compile than it saves in running; of what they run on, not.
SANITIZED = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
BUILDS = {
    # No library of ThreadSanitizer is linked: races.cpp takes the calls that the flag makes.
    RACES: ("-O1 -fsanitize=thread", "-O2 -DCUDA_HOST_RACES", ""),
    ADDRESS: (f"-O0 {SANITIZED}", f"-O1 {SANITIZED}", "-fsanitize=address,undefined"),
}  # fmt: skip


class LaunchRecord(NamedTuple):
    """One launch: the kernel's name, its blocks, the threads of each, their shared memory."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


def why_not() -> str:
    """The reason why the kernels cannot be run here, or nothing."""
    if not re.search(r"(^|-)g\+\+", Path(CXX).name) or shutil.which(CXX) is None:
        return f"the CUDA kernels run on the host with g++; the compiler here is {CXX}"
    return ""


GRID_LIMIT = 65535  # of gridDim.y and gridDim.z


@contextmanager
def use_host(*, order: int = 0, grid_limit: int = GRID_LIMIT) -> Iterator[None]:
    """Inside the block, the backend "cuda" runs on CPU tensors, its blocks and threads in order,
    or in reverse with order=1. A smaller grid_limit shows what a launch does beyond it."""
    real = cuda._cuda, cuda.BACKEND.unavailable
    library().cuda_host_set_order(order)
    library().cuda_host_set_grid_limit(grid_limit)
    _take(module(), [])
    try:
        yield
    finally:
        _take(*real)


def _take(extension: ModuleType | None, unavailable: list[str]) -> None:
    cuda._cuda, cuda.BACKEND.unavailable = extension, unavailable
    cuda.forget_device()
    register_backend(cuda.BACKEND)


def take_launches() -> list[LaunchRecord]:
    """The launches since this was last asked, in order."""
    ask = library().cuda_host_take_launches
    ask.restype = ctypes.c_char_p
    rows = [line.split("\t") for line in ask().decode().splitlines()]
    return [LaunchRecord(name, *map(int, numbers)) for name, *numbers in rows]


@functools.cache
def module() -> ModuleType:
    return load_module("cuda_host._cuda", build())


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


@functools.cache
def build() -> Path:
    """Builds the module that this process can load, incrementally; returns its file."""
    return build_as(ADDRESS if address_sanitizer_is_loaded() else RACES)


def address_sanitizer_is_loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "__asan_init")


def build_as(kind: str) -> Path:
    """Builds the module of one kind, whether this process can load it or not."""
    kernels = [
        path
        for path in (ROOT / "csrc" / "cuda").rglob("*.cu")
        if path.stem != "device"  # its twin is device.cpp beside this file
    ]
    sources = [
        ROOT / "csrc" / "bindings" / "cuda.cpp",
        *sorted(kernels),
        *sorted(HERE.glob("*.cpp")),
    ]
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build_with_ninja(f"cuda-host-{kind}", name, sources, kind)


def build_with_ninja(folder: str, name: str, sources: list[Path], kind: str = RACES) -> Path:
    """Compiles the sources in build/`folder`, incrementally, and links them to the file `name`."""
    path = ROOT / "build" / folder
    path.mkdir(parents=True, exist_ok=True)
    command = [setup.setup_cuda.find_ninja(), "-C", path]
    with FileLock(path / "lock"):  # every worker of pytest-xdist comes here at once
        (path / "build.ninja").write_text(ninja_file(name, sources, *BUILDS[kind]))
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"the CUDA kernels do not compile on the host:\n{result.stdout}", pytrace=False)
    return path / name


def ninja_file(
    name: str, sources: list[Path], kernel_flags: str, other_flags: str, link_flags: str
) -> str:
    """For a folder in build/, to which the sources are named relatively: what was compiled holds
    where a checkout is copied with it."""
    import pybind11

    # By its real path: an environment that has it by a link compiles nothing anew.
    pybind = Path(pybind11.get_include()).resolve()
    python = (sysconfig.get_path("include"), pybind)
    up = Path("..", "..")
    here, csrc = up / HERE.relative_to(ROOT), up / "csrc"
    includes = [f"-I{here}", f"-I{csrc}/cuda", *(f"-isystem {path}" for path in python)]
    common = " ".join([CXX_FLAGS, *includes])
    lines = [
        f"rule cxx\n  command = {CXX} -MMD -MF $out.d {common} $flags -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {CXX} -shared {link_flags} $in -o $out",
    ]
    objects = []
    for source in sources:
        if source.suffix == ".cu":
            flags = kernel_flags
        elif source.parent.name == "bindings":
            flags = f"-O1 -I{csrc} {HOST_ARCHITECTURE}"
        else:
            flags = other_flags
        objects.append(f"{source.parent.name}/{source.name}.o")
        lines.append(f"build {objects[-1]}: cxx {up / source.relative_to(ROOT)}\n  flags = {flags}")
    lines.append(f"build {name}: link {' '.join(objects)}\n")
    return "\n".join(lines)
