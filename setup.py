"""Builds the extension modules. Metadata lives in pyproject.toml.

`llama_fast._cpu`: every source in csrc/cpu is compiled once for each instruction set, into a
namespace of that name, and the best one is chosen by CPUID when the module is imported. Nothing
here knows of torch, so one build serves every torch version.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# GCC 12 warns of its own avx512fintrin.h (GCC bug 105593).
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-maybe-uninitialized"
X86_64_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
}
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"scalar": "", **(X86_64_FLAGS if IS_X86_64 else {})}

# No -march=native and no -ffast-math: the module must run on any CPU of its architecture, and
# NaN and infinity must behave.
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall"
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class NinjaBuild(build_ext):
    """Compiles with ninja, in parallel and incrementally, and links one shared module."""

    def build_extension(self, extension: Extension) -> None:
        import ninja
        import pybind11

        build_dir = ROOT / "build" / f"cpu-{sysconfig.get_platform()}-{sys.version_info.minor}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target = (ROOT / self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        (build_dir / "build.ninja").write_text(ninja_file(target, includes))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, "--quiet"], check=True)


def ninja_file(target: Path, includes: list[str]) -> str:
    cxx = sysconfig.get_config_var("CXX").split()[0]
    common = " ".join([CXX_FLAGS, *OPENMP, f"-I{ROOT}/csrc"])
    built_for = " ".join(f"-DLLAMA_FAST_HAS_{isa.upper()}" for isa in ISA_FLAGS)
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {common} $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared {' '.join(OPENMP)} {link_flags()} $in -o $out",
    ]
    objects = ["binding.o"]
    binding_flags = " ".join([built_for, *(f"-isystem {path}" for path in includes)])
    lines.append(f"build binding.o: cxx {ROOT}/csrc/bindings/cpu.cpp\n  flags = {binding_flags}")
    for isa, isa_flags in ISA_FLAGS.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            objects.append(f"{isa}/{source.stem}.o")
            flags = f"-DISA={isa} -DISA_{isa.upper()} {isa_flags}"
            lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {flags}")
    lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
    return "\n".join(lines)


def link_flags() -> str:
    return "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--gc-sections"


# The sources are listed in the ninja file; the extension names only what setuptools must know.
setup(ext_modules=[Extension("llama_fast._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
