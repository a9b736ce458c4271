"""The CUDA C++ kernels of csrc/cuda compiled for a chip that need not be here, file by file."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from ...config.quantization import NAMED
from ...errors import BackendError
from ...utils.files import atomic_file

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "csrc" / "cuda"
# How a dtype stands in a mangled name.
MANGLED = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


def source_of(label: str) -> Path | None:
    """Returns the file of the kernels of an op, "linear swiglu int8" say, or of those of its
    gradient; None where there is none.

    Within the folder of its family, linear's epilogue swiglu is swiglu.cu and linear is linear.cu.
    Packed documents are an argument of attention's own kernels.
    """
    op, *variant = label.split()
    words = ("quantized" if word in NAMED else word for word in variant if word != "packed")
    stem = "_".join((op.removesuffix("_backward"), *words))
    families = [path.name for path in SOURCES.glob("*") if f"{stem}_".startswith(f"{path.name}_")]
    files = [SOURCES / f"{stem}.cu"]
    for family in families:
        files.append(SOURCES / family / f"{stem.removeprefix(family).lstrip('_') or family}.cu")
    return next((file for file in files if file.is_file()), None)


def kernel_names(label: str) -> list[str]:
    """Of the kernels that an op's file launches, those of the op itself, forward or backward."""
    source = source_of(label)
    if source is None:
        return []
    backward = label.split()[0].endswith("_backward")
    names = set(re.findall(r"(\w+_kernel)\s*[(<]", "".join(_texts(source).values())))
    return sorted(name for name in names if ("_bwd" in name) == backward)


def _texts(source: Path) -> dict[Path, str]:
    """A source and the headers beside it that it includes."""
    found: dict[Path, str] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found[path] = path.read_text()
            included = re.findall(r'#include "([^"]+)"', found[path])
            waiting += [(path.parent / name).resolve() for name in included]
    return found


def cubin(source: Path, architecture: str) -> Path:
    """Compiles a file of csrc/cuda for an architecture ("90a") unless it is compiled already.

    Raises BackendError where the sources or nvcc are missing, or nvcc does not know the
    architecture.
    """
    setup = _setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise BackendError(
            "no nvcc was found, which compiles the CUDA kernels: set CUDA_HOME to "
            f"{setup.TOOLKIT}; --backend triton does without"
        )
    known = setup.known_architectures(nvcc)
    if setup.number(architecture) not in known:
        raise BackendError(
            f"{nvcc} compiles for {', '.join(f'sm_{n}' for n in sorted(known))}, and not for "
            f"sm_{architecture}; install a later CUDA toolkit"
        )
    host = sysconfig.get_config_var("CXX").split()[0]
    options = [*setup.NVCC_FLAGS.split(), "-ccbin", host, f"-I{SOURCES}", "-cubin",
               "-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]  # fmt: skip
    texts = _texts(source)
    content = [str(nvcc), *options, *(text for _, text in sorted(texts.items()))]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    target = ROOT / "build" / "profile" / f"{source.stem}.sm_{architecture}.{key}.cubin"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as partial:
            command = [nvcc, *options, "-o", partial, source]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BackendError(f"nvcc does not compile {source.name}: {done.stderr.strip()}")
    return target


def why_not() -> str:
    """Why nothing can be compiled here, or nothing."""
    if not (ROOT / "setup_cuda.py").is_file():
        return "this installation has no CUDA sources; run it in a checkout of llama_fast"
    return ""


@functools.cache
def _setup() -> ModuleType:
    """setup_cuda.py, which builds the extension module: the same nvcc and the same flags."""
    if reason := why_not():
        raise BackendError(reason)
    spec = importlib.util.spec_from_file_location("llama_fast_setup_cuda", ROOT / "setup_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readable(mangled: list[str]) -> dict[str, str]:
    """linear_fwd_kernel<half, DenseWeight<half>, 2> of each mangled name, where there is c++filt;
    the kernel's name alone elsewhere."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return {name: re.sub(r".*?\d+([a-z]\w*?_kernel).*", r"\1", name) for name in mangled}
    said = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True).stdout
    return dict(zip(mangled, map(_shorter, said.splitlines()), strict=True))


def _shorter(name: str) -> str:
    """Without namespaces, result and arguments."""
    depth, end = 0, len(name)
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = index
            break
    short = re.sub(r"\b\w+::", "", name[:end]).removeprefix("void ")
    return short.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
