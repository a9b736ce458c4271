"""What nvcc makes of the kernels, read from the compiled module: registers, spills, shared memory
and matrix instructions of every kernel for every architecture that is tested here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fast.bench.profile.instructions import parse_sass
from llama_fast.triton_kernels import cubin

from .test_cuda import ROOT, setup_cuda

NVCC = setup_cuda.find_nvcc()


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="this needs nvcc, of a CUDA toolkit")
needs_cuobjdump = pytest.mark.skipif(
    NVCC is None or cubin.find_tool("cuobjdump") is None,
    reason="this needs nvcc and cuobjdump, of a CUDA toolkit",
)


@pytest.fixture(scope="module")
def architectures(request) -> list[str]:
    """Every kernel is in 90a; 80 takes as long again to compile."""
    return ["80", "90a"] if request.config.getoption("--all") else ["90a"]


@pytest.fixture(scope="module")
def built(architectures) -> Path:
    folder = ROOT / "build" / "-".join(["cuda-code", *architectures])
    target = folder / "_cuda.so"
    setup_cuda.build_cuda_module(target, folder, architectures, "--Werror=all-warnings")
    return target


@pytest.fixture(scope="module")
def kernels(built) -> list[cubin.Usage]:
    return cubin.usages(built)


@pytest.fixture(scope="module")
def listings(built) -> list[tuple[str, str]]:
    return cubin.listings(built)


@needs_nvcc
def test_it_builds_and_imports_without_a_gpu(built, architectures):
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.architectures(), module.device_type(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [",".join(architectures), "cuda", "False"], done.stderr


@needs_cuobjdump
def test_every_kernel_is_there_for_every_architecture(kernels, architectures):
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    names = set(re.findall(r"(\w+_kernel)\(", sources))
    assert "linear_fwd_kernel" in names
    for architecture in architectures:
        compiled = " ".join(k.name for k in kernels if k.architecture == architecture)
        missing = [name for name in names if name not in compiled]
        assert not missing, f"sm_{architecture} lacks {missing}"


@needs_cuobjdump
def test_no_kernel_spills(kernels):
    spilling = [kernel for kernel in kernels if kernel.stack]
    assert not spilling, "\n".join(map(str, spilling))


@needs_cuobjdump
def test_warpgroups_pass_on_the_registers_that_they_have(kernels, listings):
    """What a launch gives, and what stands behind setmaxnreg.dec up to the kernel's end."""
    source = (ROOT / "csrc" / "cuda" / "attention" / "prefill_sm90.cuh").read_text()
    count = {name: int(n) for name, n in re.findall(r"(\w+)_REGISTERS = (\d+)", source)}
    given = {k.registers for k in kernels if k.architecture == "90a" and "wgmma" in k.name}
    assert given == {count["LAUNCH"]}
    found = 0
    for _, code in listings:
        _, shrunk, behind = code.partition("USETMAXREG.DEALLOC")
        if shrunk:
            found += 1
            assert max(map(int, re.findall(r"\bR(\d+)\b", behind))) < count["PRODUCER"]
    assert found == 4


@pytest.fixture(scope="module")
def instructions(listings) -> dict[str, list[str]]:
    """Every kernel's instructions, of all its instances and architectures together."""
    found: dict[str, list[str]] = {}
    for mangled, code in listings:
        name = re.search(r"\d([a-z_]+?)_kernel", mangled)[1]
        found.setdefault(name, []).extend(one.opcode for one in parse_sass(code))
    return found


@needs_cuobjdump
def test_matrix_instructions_are_where_they_should_be(instructions):
    def kernels_with(pattern: str) -> set[str]:
        return {
            name
            for name, codes in instructions.items()
            if any(re.match(pattern, code) for code in codes)
        }

    few = {"attention_decode", "attention_decode_quantized"}
    assert kernels_with("HMMA") == {"linear_fwd", "attention_prefill"} | few
    assert kernels_with("HGMMA") == kernels_with("UTMALDG") == {"attention_prefill_wgmma"}
    # griddepcontrol.wait and .launch_dependents
    append = {"kv_append_fwd", "kv_append_quantized_fwd"}
    overlapping = {"rms_norm_fwd", "swiglu_fwd", "linear_fwd"} | append | few
    assert kernels_with("ACQBULK") == kernels_with("PREEXIT") == overlapping


@needs_cuobjdump
def test_linear_has_no_division_of_whole_numbers(instructions):
    """It begins by I2F, a conversion; nothing else of these kernels has one."""
    assert not [code for code in instructions["linear_fwd"] if code.startswith("I2F")]


@needs_cuobjdump
def test_products_of_warpgroups_are_not_serialised(instructions):
    """Where ptxas cannot follow the registers of a product, it waits behind each: there would be
    more waits than the source has, four in each instance."""
    codes = instructions["attention_prefill_wgmma"]
    instances = codes.count("USETMAXREG.DEALLOC.CTAPOOL")
    assert instances == 4  # two dtypes, two head dims
    assert sum(code.startswith("WARPGROUP.DEPBAR") for code in codes) == 4 * instances
