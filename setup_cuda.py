"""Builds `llama_fast._cuda` from csrc/cuda with nvcc, for setup.py. Nothing here knows of torch.

The environment variable LLAMA_FAST_CUDA says for which GPUs:
    auto       those of this machine that nvcc can compile for, and nothing where there is none
               (the default); where that fails, the package is installed without these kernels
    off        nothing
    all        every architecture that the kernels serve and nvcc knows, and PTX for later ones
    80,90a,…   these compute capabilities without the dot; +PTX behind one adds its PTX
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
VARIABLE = "LLAMA_FAST_CUDA"
OLDEST = 80  # cp.async and bfloat16 matrix products
ALL = ("80", "86", "89", "90a", "100", "120")
# Warnings are errors in the tests alone (tests/test_cuda_code.py): another nvcc has others.
NVCC_FLAGS = "-O3 -std=c++20 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden"


# What an installation needs, for messages.
TOOLKIT = (
    "a CUDA toolkit (12.4 or later; 12.8 for compute capability 10 and 12; of no later major "
    "version than the driver's), put its nvcc on PATH, or, where the driver is 580 or later, "
    "pip install nvidia-cuda-nvcc"
)


class NoCuda(Exception):
    """The module was asked for and cannot be built; the text says why and what to do."""


def architectures(asked: str | None = None) -> list[str]:
    """The architectures to build for, such as ["80", "90a", "120+PTX"]; none: build nothing."""
    asked = what_is_asked() if asked is None else asked
    if asked == "off":
        return []
    if asked == "auto":
        return architectures_of_this_machine()
    known = known_architectures(need_nvcc())
    if asked == "all":
        newest = newest_with_ptx(known)
        return [f"{name}+PTX" if name == newest else name for name in ALL if number(name) in known]
    chosen = [name.strip() for name in asked.split(",")]
    for name in chosen:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name) or number(name) not in known:
            raise NoCuda(
                f"{VARIABLE}={asked}: {name!r} is no architecture that this nvcc knows. Give auto, "
                f"off, all, or some of {', '.join(map(str, sorted(known)))} (90a for Hopper)"
            )
        if number(name) < OLDEST:
            raise NoCuda(f"{VARIABLE}={asked}: the kernels need compute capability 8.0 or later")
    return chosen


def what_is_asked() -> str:
    return os.environ.get(VARIABLE) or "auto"


def architectures_of_this_machine() -> list[str]:
    """Those of its GPUs that nvcc knows. For a GPU that is newer than nvcc: the newest code of its
    major version, or PTX, which the driver compiles. What the driver is too old for is left out."""
    nvcc = find_nvcc()
    found = sorted({int(gpu) for gpu in gpus() if int(gpu) >= OLDEST}) if nvcc else []
    if not found or driver_is_too_old(nvcc):
        return []
    try:
        known = known_architectures(nvcc)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"llama_fast: the CUDA kernels are not built: {error}", file=sys.stderr)
        return []
    chosen = set()
    for gpu in found:
        same_major = [arch for arch in known if OLDEST <= arch <= gpu and arch // 10 == gpu // 10]
        if gpu == 90 and gpu in known:
            chosen.add("90a")
        elif same_major:
            chosen.add(str(max(same_major)))
        elif newest := newest_with_ptx(known, gpu):
            chosen.add(f"{newest}+PTX")
    # The code of an architecture is there where its PTX is.
    return sorted(chosen - {name.removesuffix("+PTX") for name in chosen if "+PTX" in name})


def newest_with_ptx(known: set[int], gpu: int | None = None) -> str | None:
    """The newest architecture of ALL that nvcc knows, and `gpu` too, whose PTX later GPUs can run:
    that of 90a runs on no other."""
    plain = [n for n in ALL if n.isdigit() and int(n) in known and (gpu is None or int(n) <= gpu)]
    return plain[-1] if plain else None


def driver_is_too_old(nvcc: Path) -> bool:
    """Whether what this nvcc links would not run on this machine's driver: a program runs on the
    drivers of its major version of CUDA and later ones. CUDA Compatibility, "Minor Version
    Compatibility"."""
    driver, toolkit = driver_version(), nvcc_version(nvcc)
    if driver is None or toolkit is None or toolkit[0] <= driver[0]:
        return False
    print(
        f"llama_fast: the CUDA kernels are not built: {nvcc} is of CUDA {text(toolkit)}, and this "
        f"machine's driver serves CUDA {text(driver)}. {remedy(driver)}, then install again",
        file=sys.stderr,
    )
    return True


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver serves, such as (12, 4)."""
    return version_in(["nvidia-smi"], r"CUDA[ \w]* Version: *(\d+)\.(\d+)")


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    return version_in([nvcc, "--version"], r"release (\d+)\.(\d+)")


def version_in(command: list[str | Path], pattern: str) -> tuple[int, int] | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(pattern, said)
    return (int(found[1]), int(found[2])) if found else None


def text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def remedy(driver: tuple[int, int]) -> str:
    """Where an nvcc for this driver is: pip has those of CUDA 13 and later alone."""
    major = driver[0]
    where = "" if major < 13 else f" (pip install 'nvidia-cuda-nvcc=={major}.*')"
    return f"Set CUDA_HOME to a toolkit of CUDA {major}{where}, or update the driver"


def number(name: str) -> int:
    return int(re.match(r"\d+", name)[0])


def gpus() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as ["90"]."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", text, re.M)]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, or of a toolkit that pip installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
        return nvcc
    if found := shutil.which("nvcc"):
        return Path(found)
    for folder in (*sys.path, sysconfig.get_path("purelib")):
        for nvcc in sorted(Path(folder or ".").glob("nvidia/*/bin/nvcc"), reverse=True):
            return nvcc
    return None


def need_nvcc() -> Path:
    if (nvcc := find_nvcc()) is None:
        raise NoCuda(
            f"{VARIABLE}={os.environ.get(VARIABLE)} asks for the CUDA kernels, and no nvcc was "
            f"found: set CUDA_HOME to {TOOLKIT}; {VARIABLE}=off installs without them"
        )
    return nvcc


def known_architectures(nvcc: Path) -> set[int]:
    text = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    return {int(name) for name in re.findall(r"compute_(\d+)", text)}


def find_ninja() -> Path:
    """The program of pip's package, where it is complete, or of PATH."""
    try:
        import ninja

        found = ninja.BIN_DIR and shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        found = None
    if (found := found or shutil.which("ninja")) is None:
        raise FileNotFoundError("no ninja was found: pip install ninja, or put one on PATH")
    return Path(found)


def build_cuda_module(target: Path, folder: Path, chosen: list[str], flags: str = "") -> None:
    """Compiles with ninja in `folder`, in parallel and incrementally, and links one module.

    flags  added to every compilation by nvcc

    MAX_JOBS limits how many compilers run at a time: each may take 2 GB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(target, chosen, flags))
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([find_ninja(), "-C", folder, "--quiet", *jobs], check=True)


def ninja_file(target: Path, chosen: list[str], flags: str = "") -> str:
    import pybind11

    nvcc = need_nvcc()
    cxx = sysconfig.get_config_var("CXX").split()[0]
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    binding = " ".join(
        [
            f"-O2 -std=c++20 -fPIC -fvisibility=hidden -Wall -I{ROOT}/csrc",
            *(f"-isystem {path}" for path in includes),
            f"'-DLLAMA_FAST_CUDA_ARCHITECTURES=\"{','.join(chosen)}\"'",
        ]
    )
    nvcc_flags = " ".join([NVCC_FLAGS, flags, f"-I{ROOT}/csrc/cuda", *map(generate, chosen)])
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {binding} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {nvcc} -ccbin {cxx} -MMD -MF $out.d {nvcc_flags} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        # nvcc knows where its static runtime is.
        f"rule link\n  command = {nvcc} -ccbin {cxx} -shared --cudart static $in -o $out",
        f"build binding.o: cxx {ROOT}/csrc/bindings/cuda.cpp",
    ]
    objects = ["binding.o"]
    for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")):
        objects.append(f"{source.relative_to(ROOT / 'csrc' / 'cuda').with_suffix('.o')}")
        lines.append(f"build {objects[-1]}: nvcc {source}")
    lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
    return "\n".join(lines)


def generate(architecture: str) -> str:
    """nvcc's option for one architecture."""
    name, _, ptx = architecture.partition("+")
    code = f"sm_{name}" if not ptx else f"[sm_{name},compute_{name}]"
    return f"-gencode 'arch=compute_{name},code={code}'"
