"""What must hold before a time means anything: the build, the tests on this GPU, compute-sanitizer,
and a replayed graph."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

import torch

import llama_fast
from llama_fast.dispatch import backends, use_backend
from llama_fast.ops.quantized_kv import quantize

from .setting import KERNELS, Setting
from .tests_apart import Selection, run_tests

ROOT = Path(__file__).parents[2]
OP_TESTS = "tests/ops/test_ops.py"
# On a GPU nearly all of the time of Triton's tests goes into compiling variants of kernels, which
# takes one core each; the CUDA kernels are compiled already.
CORES = max(1, (os.cpu_count() or 1) - 1)
ALL = "--all"  # dtypes in full, which `make test` leaves to `make test-all`
TRITON = [Selection(OP_TESTS, "triton", CORES, ALL)]
CUDA = [
    Selection(f"{OP_TESTS} tests/ops/test_linear_swiglu.py", "cuda and not cuda-host", 4, ALL),
    Selection("tests/test_captured_step.py tests/test_engine.py", "cuda_graphs"),
    Selection("tests/test_cuda_gpu.py", "not sanitizer"),
]
SANITIZERS = [Selection("tests/test_cuda_gpu.py", tool) for tool in ("memcheck", "racecheck")]
PTXAS = "ptxas.txt"


def build(setting: Setting) -> list[str]:
    """Compiles the kernels for this GPU and this CPU, as an installation would, and keeps what
    ptxas says of each: registers, spills, and what it has serialised."""
    if not setting.gpu:
        return []
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v"
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT, env={**os.environ, "NVCC_APPEND_FLAGS": flags},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if "ptxas" in line or " bytes stack" in line]
    if said:  # nothing where it was compiled before
        (setting.folder / PTXAS).write_text("\n".join(said) + "\n", encoding="utf-8")
    # Where nobody asked for it by name, an installation goes on without what does not compile.
    failed = done.returncode or "cannot be compiled for" in done.stdout
    return [done.stdout[-4000:]] if failed else []


def triton_tests(setting: Setting) -> list[str]:
    rehearsed = [Selection(OP_TESTS, "triton and rms_norm and odd and forward", options=ALL)]
    return run_tests(setting, TRITON if setting.gpu else rehearsed, "triton")


def cuda_tests(setting: Setting) -> list[str]:
    """The CUDA kernels on this GPU: the ops' cases, captured steps, and what must be asked for."""
    rehearsed = [Selection("tests/ops/test_attention_cuda.py", "warpgroups and ragged")]
    return run_tests(setting, CUDA if setting.gpu else rehearsed, "cuda")


def sanitizers(setting: Setting) -> list[str]:
    if not setting.gpu:
        return []
    if not importlib.util.find_spec("pytest"):
        return ["pytest is not installed"]
    return run_tests(setting, SANITIZERS, "")


def graph(setting: Setting) -> list[str]:
    """Ops are captured in a CUDA graph, and its replay gives what the call gave."""
    if not setting.gpu:
        return []
    x, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((4, 4096), (4096,)))
    q = torch.randn(4, 1, 32, 128, device="cuda").bfloat16()
    k, v = (torch.randn(4, 8, 4096, 128, device="cuda").bfloat16().transpose(1, 2) for _ in "kv")
    (k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    lengths = torch.tensor([4096, 17, 0, 2000], device="cuda")
    failures = []

    def step(served: Container[str]) -> tuple:
        with torch.no_grad():
            found = (llama_fast.rms_norm(x, weight),)
            if "attention" in served:
                found += (llama_fast.attention(q, k, v, lengths=lengths),)
                found += (llama_fast.attention(q, k8, v8, lengths=lengths, **scales),)
            return found

    for name in KERNELS:
        if backends()[name].unavailable:
            continue
        served = backends()[name].implementations
        with use_backend(name, strict=True):
            step(served)
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                outputs = step(served)
            x.normal_()
            lengths.copy_(torch.tensor([1, 4096, 5, 0]))
            captured.replay()
            same = all(torch.equal(a, e) for a, e in zip(outputs, step(served), strict=True))
        setting.say(f"CUDA graph of {name}", "replay equals the call" if same else "DIFFERS")
        if not same:
            failures.append(f"a replayed graph of {name} does not give what the call gives")
    return failures
