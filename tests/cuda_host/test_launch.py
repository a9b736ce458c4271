"""How a kernel is put into a stream, on a runtime that fails on demand: what the error says, and
that none is left behind."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess

import pytest

from . import host

pytestmark = pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")


@functools.cache
def library() -> ctypes.CDLL:
    target = host.ROOT / "build" / "cuda-host-launches.so"
    target.parent.mkdir(exist_ok=True)
    folder = host.HERE / "runtime"
    includes = (f"-I{folder}", f"-I{host.ROOT}/csrc/cuda")
    command = [host.CXX, *host.CXX_FLAGS.split(), "-shared", *includes]
    own = target.with_suffix(f".{os.getpid()}")  # another worker of pytest-xdist may load target
    subprocess.run([*command, folder / "launches.cpp", "-o", own], check=True)
    own.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.try_launch.restype = ctypes.c_char_p
    loaded.try_launch.argtypes = [
        ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t,
        ctypes.c_bool, ctypes.c_bool, ctypes.c_int,
    ]  # fmt: skip
    loaded.try_questions.restype = ctypes.c_char_p
    return loaded


ALL = 0b1111  # devices that are in use


def launch(
    failing="", device=0, shared=0, overlap=False, overlaps=False, ptx_version=90, contexts=ALL,
    calls_before=0,
) -> str:  # fmt: skip
    tried = library().try_launch(
        *(failing.encode(), calls_before, device, contexts, shared, overlap, overlaps, ptx_version)
    )
    return tried.decode()


@pytest.mark.parametrize(
    "call",
    [
        "cudaLaunchKernelEx",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaSetDevice",
        "cudaFuncGetAttributes",
    ],
)
def test_a_failing_call_is_told_and_taken(call):
    overlap = call == "cudaFuncGetAttributes"
    # What the kernel's code was made for is asked once; this kernel has not been asked yet.
    version = 80 if overlap else 90
    options = {"overlap": overlap, "overlaps": True, "ptx_version": version}
    said = launch(call, device=1, shared=60_000, **options)
    assert said == (
        "kernel some_fwd (grid 7 x 2 x 1, block 64 x 1 x 1, 60000 bytes of shared memory): "
        "cudaErrorFault: a fault was asked for"
    )
    assert library().last_error() == 0  # the next call of anybody does not find it
    assert library().current_device() == 0
    assert library().launches() == 0
    assert launch() == "" and library().launches() == 1


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("cudaDeviceGetAttribute", "the number of the device's multiprocessors"),
        ("cudaRuntimeGetVersion", "the version of CUDA's runtime"),
    ],
)
def test_a_question_that_fails_is_told_and_taken(call, what):
    ask = library().try_questions
    assert ask(b"") == b""
    assert ask(call.encode()).decode() == f"{what}: cudaErrorFault: a fault was asked for"
    assert library().last_error() == 0


def test_a_driver_that_does_not_say_its_version_is_none():
    assert library().try_questions(b"cudaDriverGetVersion") == b""
    assert library().last_error() == 0


def test_the_device_that_was_current_is_current_again():
    assert launch(device=3) == "" and library().current_device() == 0


@pytest.mark.parametrize("failing", ["", "cudaFuncSetAttribute", "cudaLaunchKernelEx"])
def test_a_device_that_is_not_in_use_gets_no_context(failing):
    """It was current, as the first device is in a new thread; the model is on another."""
    said = launch(failing, device=3, shared=60_000, contexts=0b1000)
    assert bool(said) is bool(failing)
    assert library().contexts() == 0b1000 and library().current_device() == 3


def test_a_device_that_cannot_be_current_again_is_told():
    said = launch("cudaSetDevice", device=3, calls_before=1)
    assert said.endswith("cudaErrorFault: a fault was asked for") and library().launches() == 1
    assert library().last_error() == 0


@pytest.mark.parametrize(("shared", "asked"), [(0, 0), (48 * 1024, 0), (48 * 1024 + 1, 49153)])
def test_more_shared_memory_than_usual_is_asked_for(shared, asked):
    assert launch(shared=shared) == "" and library().asked_for_shared_bytes() == asked


@pytest.mark.parametrize(
    ("overlap", "overlaps", "ptx_version", "expected"),
    [
        (True, True, 90, 1),
        (False, True, 90, 0),  # nobody asks for it
        (True, False, 90, 0),  # the kernel does not wait by itself
        (True, True, 80, 0),  # its code for older GPUs does not
    ],
)
def test_only_kernels_that_wait_may_overlap(overlap, overlaps, ptx_version, expected):
    assert launch(overlap=overlap, overlaps=overlaps, ptx_version=ptx_version) == ""
    assert library().overlapping_launches() == expected
