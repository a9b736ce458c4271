"""The emulated AVX-512 intrinsics against values worked out by hand, and against the CPU's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llama_fast.backends import cpu

from . import emulation


def run(isa: str, flags: str, folder: Path) -> str:
    """What intrinsics.cpp prints when it is compiled with `flags`; fails when a value is wrong."""
    program = folder / "intrinsics"
    source = emulation.HERE / "intrinsics.cpp"
    # Contraction would make one rounding of two where the source has two.
    common = ["-std=c++20", "-O1", "-ffp-contract=off", f"-DISA={isa}", f"-DISA_{isa.upper()}"]
    command = [emulation.CXX, *common, *flags.split(), str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("isa", [*emulation.AVX512, emulation.AMX])
def test_emulated_intrinsics(isa, tmp_path):
    if reason := emulation.why_no_x86_compiler():
        pytest.skip(reason)
    emulated = run(isa, f"{emulation.ISA_FLAGS[isa]} -DMAY_USE_TILES=true", tmp_path)
    if isa in cpu.isas():
        native = run(isa, emulation.setup.X86_64_FLAGS[isa], tmp_path)
        assert emulated.splitlines() == native.splitlines()
