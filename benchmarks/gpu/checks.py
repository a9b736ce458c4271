"""What must hold before a time means anything: the build, the tests on this GPU, compute-sanitizer,
and a replayed graph."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import llama_fast
from llama_fast.dispatch import OPS, backends, use_backend
from llama_fast.ops.quantized_kv import quantize

from .setting import KERNELS, Setting

ROOT = Path(__file__).parents[2]
# What each process tests: on a GPU nearly all of the time goes into compiling variants of kernels.
DTYPES = ("float32", "bfloat16", "float16 and not bfloat16")
OP_TESTS = "tests/ops/test_ops.py"
TRITON = [
    "rms_norm and not add",
    "add_rms_norm",
    "swiglu",
    "rope or kv_append",
    "linear_cross_entropy",
    *(f"linear_quantized and {dtype}" for dtype in DTYPES),
    *(
        f"attention and {which} and {dtype}"
        for which in ("forward", "gradient")
        for dtype in DTYPES
    ),
]
# Of the CUDA kernels, which are compiled already: files, and what of them.
CUDA = [
    (f"{OP_TESTS} tests/ops/test_linear_swiglu.py", "cuda and not cuda-host"),
    ("tests/test_decode.py tests/test_buckets.py", "cuda_graphs"),
    ("tests/test_cuda_gpu.py", "not sanitizer"),
]
SANITIZERS = [("tests/test_cuda_gpu.py", tool) for tool in ("memcheck", "racecheck")]


def build(setting: Setting) -> list[str]:
    """Compiles the kernels for this GPU and this CPU, as an installation would."""
    if not setting.gpu:
        return []
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"] if done.returncode else []


def triton_tests(setting: Setting) -> list[str]:
    chosen = TRITON if setting.gpu else ["rms_norm and odd and not add"]
    tests = [(OP_TESTS, f"triton and ({which})") for which in chosen]
    return run_tests(setting, tests, "triton")


def cuda_tests(setting: Setting) -> list[str]:
    """The CUDA kernels on this GPU: the ops' cases, captured steps, and what must be asked for."""
    if not setting.gpu:
        tests = [("tests/ops/test_attention_cuda.py", "warpgroups and ragged")]
        return run_tests(setting, tests, "cuda")
    return run_tests(setting, CUDA, "cuda")


def sanitizers(setting: Setting) -> list[str]:
    return run_tests(setting, SANITIZERS, "") if setting.gpu else []


def run_tests(setting: Setting, tests: list[tuple[str, str]], backend: str) -> list[str]:
    """Each (files, expression) in a process of its own; where there is no pytest, the cases of the
    backend's ops without it."""
    if not importlib.util.find_spec("pytest"):
        return check_cases(setting, backend) if backend else ["pytest is not installed"]

    def run(selection: tuple[str, str]) -> str:
        files, which = selection
        command = [sys.executable, "-m", "pytest", *files.split(), "--maxfail=10", "-k", which]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--tb=line"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        said = done.stdout.strip().splitlines() or [done.stderr[-400:]]
        setting.say(f"tests of {files}: {which}", said[-1])
        return "\n".join(said[-6:]) if done.returncode else ""

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return [failure for failure in pool.map(run, tests) if failure]


def check_cases(setting: Setting, backend: str) -> list[str]:
    """Every case of every op that the backend has, against float64, without pytest."""
    from tests.ops.oracle import assert_accurate, references, run_poisoned

    rows = backends()[backend].implementations
    passed, failures = 0, []
    for name, op in OPS.items():
        for case in op.cases() if op.cases and name in rows else ():
            for dtype in case.dtypes:
                args = case.make(torch.Generator().manual_seed(0), dtype, setting.device)
                if rows[name].unsupported(*args):
                    continue
                try:
                    with use_backend(backend, strict=True):
                        actual = run_poisoned(op, args)
                    assert_accurate(actual, *references(op, args), f"{name} {case} {dtype}")
                    passed += 1
                except Exception as error:
                    failures.append(f"{name} {case} {dtype}: {error}"[:300])
    text = f"{passed} cases right, {len(failures)} wrong (without pytest: forward passes alone)"
    setting.say(f"op tests of {backend}", text)
    return failures


def graph(setting: Setting) -> list[str]:
    """Ops are captured in a CUDA graph, and its replay gives what the call gave."""
    if not setting.gpu:
        return []
    x, weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((4, 4096), (4096,)))
    q = torch.randn(4, 1, 32, 128, device="cuda").bfloat16()
    k, v = (torch.randn(4, 8, 4096, 128, device="cuda").bfloat16().transpose(1, 2) for _ in "kv")
    caches = {"attention": (k, v), "attention_quantized": (quantize(k), quantize(v))}
    lengths = torch.tensor([4096, 17, 0, 2000], device="cuda")
    failures = []

    def step(served: Container[str]) -> tuple:
        with torch.no_grad():
            attended = (
                llama_fast.attention(q, *cache, lengths=lengths)
                for op, cache in caches.items()
                if op in served
            )
            return llama_fast.rms_norm(x, weight), *attended

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
