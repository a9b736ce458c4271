"""Building llama_fast._cuda, what it is built for, and what it says when it cannot run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import llama_fast
from llama_fast import attention, explain, linear, rms_norm, use_backend
from llama_fast.backends import cuda, cuda_device
from llama_fast.backends.cuda_device import serves
from llama_fast.dispatch import OPS, choice, register_backend
from llama_fast.errors import BackendError, KernelError
from llama_fast.ops.quantized_weight import QuantizedWeight

from .cpu_host.emulation import load_module
from .cuda_host import host

ROOT = Path(__file__).parent.parent
setup_cuda = load_module("llama_fast_setup_cuda", ROOT / "setup_cuda.py")
on_host = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")


@pytest.fixture
def toolkit(monkeypatch):
    """A toolkit that knows these architectures, whatever this machine has."""
    known = {75, 80, 86, 89, 90, 100, 120}
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(setup_cuda, "known_architectures", lambda nvcc: known)
    monkeypatch.setattr(setup_cuda, "driver_version", lambda: None)
    return known


def test_architectures_that_are_asked_for(toolkit):
    assert setup_cuda.architectures("off") == []
    assert setup_cuda.architectures("80,90a") == ["80", "90a"]
    assert setup_cuda.architectures("120+PTX") == ["120+PTX"]
    assert setup_cuda.architectures("all") == ["80", "86", "89", "90a", "100", "120+PTX"]
    toolkit -= {100, 120}  # PTX of 90a would run on no other GPU
    assert setup_cuda.architectures("all") == ["80", "86", "89+PTX", "90a"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [("75", "8.0 or later"), ("95", "'95' is no architecture"), ("hopper", "'hopper' is no arch")],
)
def test_architectures_that_cannot_be(toolkit, asked, says):
    with pytest.raises(setup_cuda.NoCuda, match=says):
        setup_cuda.architectures(asked)


def test_auto_builds_for_the_gpus_of_the_machine(toolkit, monkeypatch):
    monkeypatch.delenv("LLAMA_FAST_CUDA", raising=False)
    for gpus, expected in [([], []), (["90", "90"], ["90a"]), (["75", "86"], ["86"])]:
        monkeypatch.setattr(setup_cuda, "gpus", lambda gpus=gpus: gpus)
        assert setup_cuda.architectures() == expected
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: None)
    assert setup_cuda.architectures() == []


@pytest.mark.parametrize(
    ("gpus", "lacks", "expected"),
    [
        (["120"], {100, 120}, ["89+PTX"]),
        (["89", "90", "100"], {100, 120}, ["89+PTX", "90a"]),
        (["103", "121"], set(), ["100", "120"]),  # code of a major version runs on its later GPUs
        (["90"], {89, 90, 100, 120}, ["86+PTX"]),
        (["80"], {80, 86, 89, 90, 100, 120}, []),
    ],
)
def test_auto_builds_what_nvcc_knows(toolkit, monkeypatch, gpus, lacks, expected):
    """And what it builds runs on each of the machine's GPUs."""
    toolkit -= lacks
    monkeypatch.setattr(setup_cuda, "gpus", lambda: gpus)
    assert setup_cuda.architectures("auto") == expected
    for gpu in gpus if expected else []:
        assert any(serves(built, int(gpu[:-1]), int(gpu[-1])) for built in expected)


PROGRAM = "#!/bin/sh\ncat <<'END'\n{}\nEND\n"


def program(path: Path, says: str) -> Path:
    """A program that says so, whatever it is asked."""
    path.write_text(PROGRAM.format(says))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("driver", "toolkit", "expected", "says"),
    [
        ("12.4", "13.0", [], r"CUDA 13.0.*driver serves CUDA 12.4.*toolkit of CUDA 12, or update"),
        ("13.0", "14.1", [], r"pip install 'nvidia-cuda-nvcc==13\.\*'"),
        ("12.4", "12.8", ["80"], ""),  # minor versions are compatible
        ("13.1", "12.8", ["80"], ""),
    ],
)
def test_auto_builds_nothing_that_the_driver_is_too_old_for(
    monkeypatch, tmp_path, capfd, driver, toolkit, expected, says
):
    nvcc = program(tmp_path / "nvcc", f"release {toolkit}, V{toolkit}.88\ncompute_80")
    program(tmp_path / "nvidia-smi", f"8.0\n| Driver Version: 5   CUDA Version: {driver}   |")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: nvcc)
    assert setup_cuda.architectures("auto") == expected
    said = capfd.readouterr().err
    assert re.search(says, said) if says else not said
    assert setup_cuda.architectures("80") == ["80"]  # for another machine


SETUP = """
import subprocess, sys
sys.argv = ["setup.py", "build_ext", "--inplace"]
sys.path.insert(0, {root!r})
import setup_cuda
def copy(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
def fail(*given):
    raise subprocess.CalledProcessError(1, "ninja")
setup_cuda.gpus, setup_cuda.find_nvcc = lambda: ["90"], lambda: "nvcc"
setup_cuda.known_architectures = lambda nvcc: {{90}}
setup_cuda.driver_is_too_old = lambda nvcc: False
setup_cuda.build_cuda_module = fail
source = open({root!r} + "/setup.py").read()
# In a folder of its own, and of the CPU's kernels there is only a file.
source = source.replace("ROOT = Path(__file__).parent.resolve()", "ROOT = Path.cwd()")
source = source.replace("build_cpu_module(target, folder)", "copy(target)")
exec(compile(source, "setup.py", "exec"))
"""


@pytest.mark.parametrize(("asked", "ends_with"), [("auto", 0), ("90a", 1)])
def test_an_installation_goes_on_where_nobody_asked_for_what_fails(tmp_path, asked, ends_with):
    package = tmp_path / "llama_fast"
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "llama_fast"\nversion = "1"\n')
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package / f"_cuda{suffix}").touch()  # of another day
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(root=str(ROOT))], cwd=tmp_path, text=True,
        env=os.environ | {"LLAMA_FAST_CUDA": asked}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == ends_with, done.stderr
    assert "cannot be compiled for 90a" in done.stdout + done.stderr
    assert not (package / f"_cuda{suffix}").exists()


def test_without_nvcc_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: None)
    with pytest.raises(setup_cuda.NoCuda, match=r"CUDA_HOME.*LLAMA_FAST_CUDA=off"):
        setup_cuda.architectures("all")


def test_nvcc_is_found_in_cuda_home_first(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_cuda.find_nvcc() == nvcc
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert setup_cuda.find_nvcc() == nvcc
    pip = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    pip.parent.mkdir(parents=True)
    pip.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup_cuda.sys, "path", [str(tmp_path / "site")])
    assert setup_cuda.find_nvcc() == pip


def test_ninja_is_that_of_pip_or_of_the_path(monkeypatch, tmp_path):
    inside, on_path = (tmp_path / name / "ninja" for name in ("inside", "path"))
    for program in (inside, on_path):
        program.parent.mkdir()
        program.touch(mode=0o755)
    package = ModuleType("ninja")
    monkeypatch.setitem(sys.modules, "ninja", package)
    monkeypatch.setenv("PATH", str(on_path.parent))
    package.BIN_DIR = str(inside.parent)
    assert setup_cuda.find_ninja() == inside
    package.BIN_DIR = ""  # as the package has it where its program is missing
    assert setup_cuda.find_ninja() == on_path
    monkeypatch.setitem(sys.modules, "ninja", None)  # not installed
    assert setup_cuda.find_ninja() == on_path
    on_path.unlink()
    with pytest.raises(FileNotFoundError, match="pip install ninja, or put one on PATH"):
        setup_cuda.find_ninja()


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80+PTX", (9, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a+PTX", (12, 0), False),
        ("100", (10, 3), True),
        ("120+PTX", (12, 1), True),
    ],
)
def test_which_gpus_a_build_serves(built, gpu, runs):
    assert serves(built, *gpu) is runs


def modules() -> list[Path]:
    return sorted(Path(llama_fast.__file__).parent.glob("_c*.so"))


@pytest.mark.skipif(not shutil.which("readelf"), reason="this needs readelf, of binutils")
def test_compiled_modules_link_to_no_torch_and_no_cuda_library():
    assert modules()
    for module in modules():
        text = subprocess.run(["readelf", "-d", module], capture_output=True, text=True).stdout
        needed = re.findall(r"NEEDED.*\[(.*)\]", text)
        assert needed and not [name for name in needed if re.search("torch|c10|cuda", name)]


@pytest.mark.skipif(cuda._cuda is not None, reason="llama_fast._cuda is built here")
def test_without_the_module_it_is_said_how_to_build_it():
    with use_backend("cuda", strict=True), pytest.raises(BackendError, match="LLAMA_FAST_CUDA=all"):
        rms_norm(torch.ones(2, 8), torch.ones(8))


@pytest.mark.skipif(cuda._cuda is None, reason="llama_fast._cuda is not built here")
def test_the_module_refuses_tensors_that_are_on_no_gpu():
    with use_backend("cuda", strict=True), pytest.raises(BackendError, match="tensors are on cpu"):
        rms_norm(torch.ones(2, 8), torch.ones(8))


@on_host
def test_a_launch_that_fails_names_kernel_shapes_and_remedy(monkeypatch):
    with host.use_host():
        error = cuda._cuda.LaunchError("kernel rms_norm_fwd (grid …): out of memory")

        def fail(*args):
            raise error

        class Failing:
            LaunchError, device_type = cuda._cuda.LaunchError, cuda._cuda.device_type
            rms_norm = staticmethod(fail)

        monkeypatch.setattr(cuda, "_cuda", Failing)
        with use_backend("cuda", strict=True), pytest.raises(KernelError) as raised:
            rms_norm(torch.ones(2, 8), torch.ones(8))
    for part in ("rms_norm_fwd", r"torch.float32 (2, 8) on cpu", "CUDA_LAUNCH_BLOCKING=1"):
        assert part in str(raised.value)


@on_host
def test_after_a_launch_that_fails_the_next_one_runs():
    one = torch.ones(1, 17, 1, 64, dtype=torch.bfloat16)
    many = one.expand(65536, 17, 1, 64)
    with host.use_host(), use_backend("cuda", strict=True):
        with pytest.raises(
            KernelError, match=r"attention_prefill.*no GPU takes.*\(65536, 17, 1, 64"
        ):
            attention(many, many, many)
        assert torch.equal(attention(many[:2], many[:2], many[:2]), many[:2])


@on_host
def test_decoding_takes_a_batch_of_any_size(monkeypatch):
    """Its rows are gridDim.x, which alone goes beyond 65,535; here with two blocks to a row."""
    monkeypatch.setattr(host.module(), "kv_splits", lambda *sizes: 2)
    q, k, v = torch.randn(3, 7, 40, 1, 64).bfloat16()
    with use_backend("eager"):
        expected = attention(q[:, :1], k, v)
    with host.use_host(grid_limit=6), use_backend("cuda", strict=True):
        found = attention(q[:, :1], k, v)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


OF_DECODING = ("rms_norm", "add_rms_norm", "swiglu", "kv_append", "attention", "linear")


@on_host
def test_kernels_of_decoding_wait_for_the_one_before(monkeypatch):
    """The machine ends a launch that overlaps and in which a thread does not wait."""
    monkeypatch.setattr(cuda, "OVERLAP", True)
    with host.use_host(), use_backend("cuda", strict=True):
        host.take_launches()
        for name in OF_DECODING:
            for case in OPS[name].cases():
                args = case.make(torch.Generator().manual_seed(0), torch.bfloat16, "cpu")
                if not OPS[name].explain(*args).reasons["cuda"]:
                    OPS[name](*args)
        launched = {launch.kernel for launch in host.take_launches()}
    assert {
        "rms_norm_fwd",
        "swiglu_fwd",
        "kv_append_fwd",
        "kv_append_quantized_fwd",
        "linear_fwd",
        "linear_quantized_fwd",
        "linear_swiglu_fwd",
        "linear_swiglu_quantized_fwd",
        "attention_decode",
        "attention_decode_quantized",
    } <= launched


def test_a_gpu_of_another_architecture_is_told_what_to_do():
    for capability, says in [((9, 0), "LLAMA_FAST_CUDA=90a"), ((7, 5), "8.0 or later")]:
        assert says in cuda_device.reasons("GPU", capability, ["80"], 13000, 13000)[0]
    assert cuda_device.reasons("GPU", (8, 6), ["80"], 13000, 13000) == []


@pytest.mark.parametrize(
    ("driver", "built_with", "says"),
    [
        (12040, 13000, "CUDA 13.0.*driver here serves CUDA 12.4: update.*toolkit of CUDA 12.4 "),
        (0, 13000, "does not say: update the driver, or .* toolkit that it serves"),
        (12040, 12080, ""),
        (13010, 12080, ""),
    ],
)
def test_an_older_driver_is_a_reason(driver, built_with, says):
    """And none where it is of the same major version, but for PTX."""
    found = cuda_device.reasons("GPU", (8, 6), ["80+PTX"], driver, built_with)
    assert re.search(says, found[0]) if says else found == []
    newer = cuda_device.reasons("GPU", (12, 0), ["80+PTX"], driver, built_with)
    assert bool(newer) is (driver < built_with)
    assert not newer or re.search(says or "12.4, and compiles no PTX of a later one", newer[0])


def test_the_device_is_asked_of_driver_and_runtime(monkeypatch):
    class Older:
        device_type, architectures = staticmethod(lambda: "cuda"), staticmethod(lambda: "86,90a")
        driver_version, runtime_version = staticmethod(lambda: 12040), staticmethod(lambda: 13000)

    monkeypatch.setattr(cuda, "_cuda", Older)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (found,) = cuda.device_reasons.__wrapped__(torch.device("cuda", 1))
    assert "built with CUDA 13.0" in found
    monkeypatch.setattr(Older, "driver_version", staticmethod(lambda: 13000))
    assert cuda.device_reasons.__wrapped__(torch.device("cuda", 1)) == []


@pytest.fixture
def older_driver(monkeypatch):
    """The backend "cuda" as it is where the driver is too old, here for tensors on the CPU."""
    why = "the NVIDIA driver here serves CUDA 12.4"
    monkeypatch.setattr(cuda, "device_reasons", lambda device: [why])
    monkeypatch.setattr(choice, "_warned", set())
    unavailable, cuda.BACKEND.unavailable = cuda.BACKEND.unavailable, []
    register_backend(cuda.BACKEND)
    yield why
    cuda.BACKEND.unavailable = unavailable
    register_backend(cuda.BACKEND)


def test_with_an_older_driver_every_op_falls_back_and_one_warning_says_why(older_driver):
    with use_backend("cuda"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        served = 0
        for name, op in OPS.items():
            for case in op.cases()[:2] if op.cases else ():
                args = case.make(torch.Generator().manual_seed(0), torch.float32, "cpu")
                if "cuda" in explain(name, *args).reasons:
                    assert explain(name, *args).reasons["cuda"] in (
                        [older_driver], [f"the cuda backend has no {name}"]
                    )  # fmt: skip
                op(*args)
                served += 1
    said = [str(one.message) for one in caught if "cuda" in str(one.message)]
    assert served > 10
    assert said == [
        "ops on cpu tensors do without the cuda backend, which cannot serve them: " + older_driver
    ]
    with use_backend("cuda", strict=True), pytest.raises(BackendError, match=r"CUDA 12\.4"):
        rms_norm(torch.ones(2, 8), torch.ones(8))


@on_host
def test_prompts_of_any_length_beside_quantised_weights_warn_once(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    weight = QuantizedWeight.from_float(torch.randn(48, 64), 4, 32)
    with host.use_host(), use_backend("cuda"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for M in (16, 17, 18, 300, 17):
            linear(torch.randn(M, 64).bfloat16(), weight)
    assert [str(one.message) for one in caught] == [
        "linear runs on the cpu backend, because cuda cannot serve this call: x has 17 rows; at "
        "most 16"
    ]


@on_host
def test_under_address_and_undefined_behaviour_sanitizers(request):
    """The kernels' cases once more, in a process of its own into which the sanitizer is loaded."""
    library = subprocess.run(
        [host.CXX, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip(f"this needs AddressSanitizer's library, which {host.CXX} does not have")
    environment = {
        "LD_PRELOAD": f"{library} {library.replace('libasan', 'libubsan')}",
        # Python and torch keep what they allocate; their own code is not what is tested.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "tests.cuda_host.sanitized"]
    command += ["--all"] * request.config.getoption("--all")
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert re.search(r"^\d{2,} cases", done.stdout, re.M), done.stdout
