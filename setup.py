"""Builds the extension modules. Metadata lives in pyproject.toml.

`llama_fast._cpu`: every source in csrc/cpu is compiled once for each instruction set, into a
namespace of that name, and the best one is chosen by CPUID when the module is imported. Nothing
here knows of torch, so one build serves every torch version. `llama_fast._cuda`: see setup_cuda.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # front ends that isolate builds leave this folder out

import setup_cuda  # noqa: E402

# GCC 12 warns of its own avx512fintrin.h (GCC bug 105593).
AVX512 = (
    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni "
    "-Wno-maybe-uninitialized -Wno-uninitialized"
)
X86_64_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    # AVX2's kernels, but for the products of bytes and words
    "avx_vnni": "-DISA_AVX2 -mavx2 -mfma -mf16c -mavxvnni",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    # AVX512_BF16's kernels, but for the matrix products
    "amx": f"-DISA_AVX512_BF16 {AVX512} -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8",
}
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"scalar": "", **(X86_64_FLAGS if IS_X86_64 else {})}

# No -march=native and no -ffast-math: the module must run on any CPU of its architecture, and
# NaN and infinity must behave.
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall"
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildSources(build_py):
    def run(self) -> None:
        # What sources of another day have left there would be a part of the wheel.
        shutil.rmtree(Path(self.build_lib, "llama_fast"), ignore_errors=True)
        super().run()


class BuildWithNinja(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = (ROOT / self.get_ext_fullpath(extension.name)).resolve()
        kind = extension.name.rpartition("_")[2]  # cpu or cuda
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_platform()}-{sys.version_info.minor}"
        beside = ROOT / "llama_fast" / target.name
        if kind == "cpu":
            build_cpu_module(target, folder)
        else:
            try:
                setup_cuda.build_cuda_module(target, folder, architectures)
            except (OSError, subprocess.CalledProcessError) as error:
                beside.unlink(missing_ok=True)  # it would be another day's
                # What an optional extension says, and the installation goes on.
                raise CompileError(
                    f"the CUDA kernels cannot be compiled for {', '.join(architectures)}: {error}. "
                    f"What the compiler says stands above; {setup_cuda.VARIABLE}=off installs "
                    "without them"
                ) from error
        # Python started in the checkout imports these sources, not what was installed: they find
        # the same module beside them. A running program may have the old one loaded, so it is
        # replaced, not written to.
        if beside != target:
            partial = beside.with_name(f"{target.name}.new")
            shutil.copy2(target, partial)
            partial.replace(beside)


def build_cpu_module(
    target: Path, folder: Path, isa_flags: dict[str, str] = ISA_FLAGS, flags: str = ""
) -> None:
    """Compiles with ninja in `folder`, in parallel and incrementally, and links one shared module.

    isa_flags  the instruction sets of the module, each with its compiler flags
    flags      added to every compilation and to the link
    """
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(target, folder, isa_flags, flags))
    subprocess.run([setup_cuda.find_ninja(), "-C", folder, "--quiet"], check=True)


def ninja_file(target: Path, folder: Path, isa_flags: dict[str, str], flags: str) -> str:
    """The sources are named relative to `folder`, so what was compiled holds where a checkout is
    copied or moved with it."""
    import pybind11

    csrc = os.path.relpath(ROOT / "csrc", folder)
    cxx = sysconfig.get_config_var("CXX").split()[0]
    common = " ".join([CXX_FLAGS, *OPENMP, f"-I{csrc}", flags])
    link = " ".join([*OPENMP, link_flags(), flags])
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {common} $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared {link} $in -o $out",
    ]
    objects = ["binding.o"]
    built_for = [f"-DLLAMA_FAST_HAS_{isa.upper()}" for isa in isa_flags]
    # By its real path: an environment that has it by a link compiles nothing anew.
    includes = [sysconfig.get_path("include"), Path(pybind11.get_include()).resolve()]
    binding_flags = " ".join([*built_for, *(f"-isystem {path}" for path in includes)])
    lines.append(f"build binding.o: cxx {csrc}/bindings/cpu.cpp\n  flags = {binding_flags}")
    for isa, its_flags in isa_flags.items():
        for source in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")):
            path = source.relative_to(ROOT / "csrc" / "cpu")
            objects.append(f"{isa}/{path.with_suffix('.o')}")
            own = f"-DISA={isa} -DISA_{isa.upper()} {its_flags}"
            lines.append(f"build {objects[-1]}: cxx {csrc}/cpu/{path}\n  flags = {own}")
    lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
    return "\n".join(lines)


def link_flags() -> str:
    return "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--gc-sections"


if __name__ == "__main__":
    architectures = setup_cuda.architectures()
    # The sources are listed in the ninja files; an extension names what setuptools must know.
    extensions = [Extension("llama_fast._cpu", sources=[])]
    if architectures:
        # Nobody has asked for them by name: the package is usable without them.
        optional = setup_cuda.what_is_asked() == "auto"
        extensions.append(Extension("llama_fast._cuda", sources=[], optional=optional))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildWithNinja, "build_py": BuildSources},
    )
