"""Everything that is measured held to an older instruction set: ours, torch and llama.cpp.

Most laptops have AVX2 and no AVX-512. So that their class can be measured on any machine, each
library is held to AVX2 in its own way: our kernels are chosen, torch's libraries read variables as
they begin, and llama.cpp is built for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
_held_to: str | None = None


def hold_to(name: str) -> None:
    """Holds the processes that are started from now on to instruction set `name`, a key of
    VARIABLES. Raises ValueError where this CPU or this build lacks it."""
    from llama_fast.backends import cpu

    if name not in cpu.isas():
        raise ValueError(f"--isa {name}: this CPU, or this build, has {', '.join(cpu.isas())}")
    global _held_to
    _held_to = name
    os.environ.update(VARIABLES[name])
    sys.path.insert(0, str(llama_cpp_folder(name)))
    paths = [str(llama_cpp_folder(name)), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def held_to() -> str | None:
    return _held_to


def hold_our_kernels(name: str) -> None:
    from llama_fast.backends import cpu

    cpu._cpu.set_isa(name)


def llama_cpp_folder(name: str) -> Path:
    """Returns where `make build/llama-cpp-avx2` installs it."""
    return Path(__file__).parent.parent / "build" / f"llama-cpp-{name}"


def no_llama_cpp() -> str | None:
    """Returns why no llama.cpp of the instruction set that is asked for is here, or None."""
    if _held_to is None or llama_cpp_folder(_held_to).is_dir():
        return None
    return f"no llama.cpp is built for {_held_to}: make build/llama-cpp-{_held_to}"
