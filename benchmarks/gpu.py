"""Everything that needs a GPU, in one command: build, tests, ceilings, the ops beside their peers.

    python -m benchmarks.gpu [--seconds 540] [--parts build,tests,…] [--json FILE]
    python -m benchmarks.gpu --device cpu      # a rehearsal: tiny shapes in Triton's interpreter

Nothing is downloaded and no environment is made: it runs on the Python that starts it, with the
torch, Triton, setuptools, pybind11 and ninja that are there. Each part is a process of its own with
a limit of time. One that fails is reported, and the rest still runs; the results file is written
after every part. Rows are medians: on a GPU of times between events, with the L2 cache flushed
before each call and the time of the host apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import gpu_cuda

ROOT = Path(__file__).parent.parent
# Shares of the time: nine minutes in all, unless --seconds says otherwise. What a part leaves is
# there for those after it.
PARTS = {
    "build": 120,
    "tests": 70,
    "ceilings": 15,
    "memory_bound": 50,
    "attention": 50,
    "decode": 25,
    "model_decode": 40,
    "cross_entropy": 25,
    "graph": 15,
    "cuda_tests": 50,
    "cuda_attention": 25,
    "cuda_decode": 25,
    "cuda_model": 30,
}
OURS = "llama_fast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_part(given.part, given.device, given.json)
        return
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    failed = run_all(parts, given.device, given.seconds, given.json)
    sys.exit(1 if failed else 0)


def run_all(parts: list[str], device: str, seconds: float, target: Path | None) -> list[str]:
    """Runs the parts one after another; returns those that failed."""
    begin, spent, found, failed = time.monotonic(), 0, {"parts": {}, "rows": {}}, []
    whole = sum(PARTS[part] for part in parts)
    found["machine"] = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", found["machine"]["device"].lower()).strip("-")
    target = target or (
        ROOT / "benchmarks" / "results" / f"{name}.json" if device == "cuda" else Path(os.devnull)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        spent += PARTS[part]
        start = time.monotonic()
        limit = begin + seconds * spent / whole - start
        rows, why = start_part(part, device, limit) if limit > 5 else ([], "no time was left")
        took = time.monotonic() - start
        found["rows"] |= {row["name"]: row for row in rows}
        found["parts"][part] = {"seconds": round(took, 1), "failed": why}
        target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"== {part}: {'FAILED: ' + why if why else 'done'}, {took:.0f} s", flush=True)
        for row in rows:
            print("   " + describe(row), flush=True)
        if why:
            failed.append(part)
    print(f"results: {target}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return failed


def start_part(part: str, device: str, limit: float) -> tuple[list[dict], str]:
    """(rows, why it failed or nothing). The part's rows are lines of a file, so that what it had
    measured before a failure or its limit is kept."""
    lines = ROOT / "build" / f"gpu-{part}.jsonl"
    lines.parent.mkdir(exist_ok=True)
    lines.unlink(missing_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--device", device]
    process = subprocess.Popen(
        [*command, "--json", str(lines)], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        why = "" if process.returncode == 0 else last_lines(said)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: its compilers end too
        said, _ = process.communicate()
        why = f"stopped after {limit:.0f} s; {last_lines(said)}"
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    return [json.loads(line) for line in text.splitlines()], why


def last_lines(said: str) -> str:
    return " | ".join(line.strip() for line in said.strip().splitlines()[-6:])[-800:]


def machine(device: str) -> dict[str, Any]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU here; --device cpu rehearses without one")
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "device": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "processors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def describe(row: dict) -> str:
    if "text" in row:
        return f"{row['name']}: {row['text']}"
    times = [f"{who} {1e6 * s:.1f} µs" for who, s in row["seconds"].items()]
    ours = row["seconds"].get(OURS)
    if ours:
        times += [
            f"{who}/{OURS} {s / ours:.2f}" for who, s in row["seconds"].items() if who != OURS
        ]
    for key, unit in (("GB/s", "GB/s"), ("TFLOP/s", "TFLOP/s"), ("host_us", "µs of the host")):
        if key in row:
            times.append(f"{row[key]:.4g} {unit}")
    times += [f"{who} missing ({why[:80]})" for who, why in row.get("missing", {}).items()]
    return f"{row['name']}: " + ", ".join(times)


class Bench:
    """What a part measures with: the device, sizes, and a file of rows."""

    def __init__(self, device: str, lines: Path | None) -> None:
        import torch

        self.torch, self.device, self.lines = torch, device, lines
        self.gpu = device == "cuda"
        self.generator = torch.Generator(device).manual_seed(0)

    def size(self, n: int, tiny: int) -> int:
        return n if self.gpu else tiny

    def randn(self, *shape: int, dtype: Any = None, scale: float = 1.0) -> Any:
        dtype = dtype or self.torch.bfloat16
        x = self.torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0, scale, generator=self.generator)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median time of a call on the device."""
        from llama_fast.timing import interleaved, interleaved_on_gpu

        calls = {"call": call}
        if not self.gpu:
            return interleaved(calls, 1)["call"][0]
        return statistics.median(interleaved_on_gpu(calls, 30).seconds["call"])

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """What a call costs the host, the least of some batches; the device may lag behind."""
        best = math.inf
        for _ in range(5):
            self.sync()
            start = time.perf_counter()
            for _ in range(20 if self.gpu else 1):
                call()
            best = min(best, (time.perf_counter() - start) / (20 if self.gpu else 1))
        self.sync()
        return best

    def sync(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize()

    def row(
        self,
        name: str,
        contenders: dict[str, Callable[[], Any]],
        *,
        nbytes: int = 0,
        flops: int = 0,
        **extra: Any,
    ) -> dict[str, float]:
        """Measures the contenders in turn and writes the row; one that fails is missing."""
        found: dict[str, list[float]] = {}
        missing = {}
        for _ in range(3 if self.gpu else 1):
            for who, call in contenders.items():
                if who in missing:
                    continue
                try:
                    found.setdefault(who, []).append(self.seconds(call))
                except Exception as error:
                    missing[who] = f"{type(error).__name__}: {error}"
                    found.pop(who, None)
        seconds = {who: statistics.median(values) for who, values in found.items()}
        row = {"name": name, "seconds": seconds, "missing": missing, **extra}
        first = next(iter(contenders))
        if first in seconds:
            row["host_us"] = 1e6 * self.host_seconds(contenders[first])
            if nbytes:
                row["GB/s"] = nbytes / seconds[first] / 1e9
            if flops:
                row["TFLOP/s"] = flops / seconds[first] / 1e12
        self.write(row)
        if first in missing:
            raise RuntimeError(f"{name}: {missing[first]}")
        return seconds

    def write(self, row: dict) -> None:
        if self.lines:
            with self.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def compiled(self, function: Callable) -> Callable:
        """torch.compile's; in the rehearsal the function itself, since compiling takes long."""
        return self.torch.compile(function, dynamic=False) if self.gpu else function


def run_part(part: str, device: str, lines: Path | None) -> None:
    if part == "build":
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        sys.exit(subprocess.run(command, cwd=ROOT).returncode if device == "cuda" else 0)
    if part == "tests":
        sys.exit(run_tests(device, lines))
    if part == "cuda_tests":
        sys.exit(run_cuda_tests(device, lines))
    import torch

    from llama_fast.registry import backends, use_backend

    backends()  # declares the ops
    torch.manual_seed(0)
    of_cuda = part.startswith("cuda_")
    with gpu_cuda.kernels(device == "cuda") if of_cuda else use_backend("triton", strict=True):
        failures = []
        for measure in MEASURES[part]:
            try:
                measure(Bench(device, lines))
            except Exception as error:
                failures.append(f"{measure.__name__}: {type(error).__name__}: {error}")
    if failures:
        sys.exit("\n".join(failures))


# What each process tests: on a GPU nearly all of the time goes into compiling variants of kernels.
DTYPES = ("float32", "bfloat16", "float16 and not bfloat16")
SELECTIONS = [
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
CUDA_SELECTIONS = [
    ("tests/ops/test_ops.py", "cuda and not cuda-host"),
    ("tests/test_decode.py tests/test_buckets.py", "cuda_graphs"),
    ("tests/test_cuda_gpu.py", "not sanitizer"),
    ("tests/test_cuda_gpu.py", "memcheck"),
    ("tests/test_cuda_gpu.py", "racecheck"),
]


def run_tests(device: str, lines: Path | None) -> int:
    """The op tests of the Triton backend, on this device; with pytest where there is one."""
    if not importlib.util.find_spec("pytest"):
        return check_cases("triton", device, lines)
    chosen = SELECTIONS if device == "cuda" else ["rms_norm and odd"]
    return run_pytest(
        [("tests/ops/test_ops.py", f"triton and ({which})") for which in chosen], lines
    )


def run_cuda_tests(device: str, lines: Path | None) -> int:
    """The CUDA kernels on this GPU: the ops' cases, captured steps, and compute-sanitizer."""
    if device != "cuda":
        return run_pytest([("tests/ops/test_attention_cuda.py", "warpgroups and ragged")], lines)
    if not importlib.util.find_spec("pytest"):
        return check_cases("cuda", device, lines)
    return run_pytest(CUDA_SELECTIONS, lines)


def run_pytest(selections: list[tuple[str, str]], lines: Path | None) -> int:
    """Each (files, expression) in a process of its own."""
    bench = Bench("cpu", lines)

    def run(selection: tuple[str, str]) -> int:
        files, which = selection
        command = [sys.executable, "-m", "pytest", *files.split(), "--maxfail=10", "-k", which]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--tb=line"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        said = done.stdout.strip().splitlines() or [done.stderr[-400:]]
        bench.write({"name": f"tests of {files}: {which}", "text": said[-1]})
        if done.returncode:
            print("\n".join(said[-12:]), flush=True)
        return done.returncode

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return max(pool.map(run, selections))


def check_cases(backend: str, device: str, lines: Path | None) -> int:
    """Every case of every op that the backend has, against float64, without pytest."""
    import torch

    from llama_fast.registry import OPS, backends, use_backend
    from tests.ops.oracle import assert_accurate, references, run_poisoned

    rows = backends()[backend].implementations  # asked first: it declares the ops
    passed, failures = 0, []
    for name, op in OPS.items():
        for case in op.cases() if op.cases and name in rows else ():
            for dtype in case.dtypes:
                args = case.make(torch.Generator().manual_seed(0), dtype, device)
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
    Bench("cpu", lines).write({"name": f"op tests of {backend}", "text": text})
    print("\n".join(failures[:20]))
    return 1 if failures else 0


def ceilings(b: Bench) -> None:
    n = b.size(1 << 30, 1 << 16)
    source = b.torch.empty(n, dtype=b.torch.uint8, device=b.device).fill_(1)
    target = b.torch.empty_like(source)
    b.row("ceiling copy", {"torch": lambda: target.copy_(source)}, nbytes=2 * n)
    m = b.size(8192, 64)
    x, y = b.randn(m, m), b.randn(m, m)
    b.row("ceiling bfloat16 matmul", {"torch": lambda: x @ y}, flops=2 * m**3)


def memory_bound(b: Bench) -> None:
    """N = 8192 rows of the 8B shape, 64 MB a tensor; and N = 2048 for the time of the host."""
    from llama_fast.registry import OPS

    for N in (b.size(8192, 8), b.size(2048, 4)):
        C, F, H, K, D = (b.size(*n) for n in ((4096, 64), (14336, 96), (32, 4), (8, 2), (128, 16)))
        x, y, weight, grad = b.randn(N, C), b.randn(N, C), b.randn(C), b.randn(N, C)
        gate, up = b.randn(N, 2 * F).chunk(2, dim=-1)
        q, k, _ = b.randn(1, N, H + 2 * K, D).split((H, K, K), dim=2)
        angle = b.randn(N, D // 2, dtype=b.torch.float32)
        cos, sin = angle.cos(), angle.sin()
        calls = {
            "rms_norm": (x, weight, 1e-5),
            "add_rms_norm": (x, y, weight, 1e-5),
            "swiglu": (gate, up),
            "rope": (q, k, cos, sin, False),
            "rms_norm_backward": (grad, x, weight, 1e-5),
            "add_rms_norm_backward": (grad, y, x, weight, 1e-5),
            "swiglu_backward": (b.randn(N, F), gate, up),
        }
        for name, args in calls.items():
            op = OPS[name]
            outputs = op(*args)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            tensors = [*(a for a in args if isinstance(a, b.torch.Tensor)), *outputs]
            nbytes = sum(t.numel() * t.element_size() for t in tensors)
            compiled = b.compiled(op.eager)
            b.row(
                f"{name} N={N}",
                {
                    OURS: lambda op=op, args=args: op(*args),
                    "compile": lambda compiled=compiled, args=args: compiled(*args),
                    "eager": lambda op=op, args=args: op.eager(*args),
                    **libraries(op, args),
                },
                nbytes=nbytes,
            )


def libraries(op: Any, args: tuple) -> dict[str, Callable[[], Any]]:
    """Calls of the libraries that are installed here and serve this call of the op."""
    from llama_fast import contenders

    found = {}
    for name in contenders.LIBRARIES:
        if not contenders.why_not(name, op, args):
            found[name] = functools.partial(contenders.call(name, op), *args)
    return found


def sdpa(b: Bench, backend: str, q: Any, k: Any, v: Any, causal: bool) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return b.torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip


def attention(b: Bench) -> None:
    """Causal, 32 query and 8 KV heads of 128, bfloat16; 16k tokens in all. Backward alone is the
    time of both passes less that of the forward one."""
    from llama_fast.registry import OPS

    op = OPS["attention"]
    for T in (2048, 4096, 8192, 16384) if b.gpu else (32,):
        B, H, K, D = max(1, b.size(16384, 32) // T), b.size(32, 4), b.size(8, 2), b.size(128, 16)
        q, k, v = b.randn(B, T, H, D), b.randn(B, T, K, D), b.randn(B, T, K, D)
        grad = b.randn(B, T, H, D)
        forward_flops = op.cost(q, k, v, True, None, None, False).flops

        def peers(call: Callable[[str], Any]) -> dict[str, Callable[[], Any]]:
            kinds = {"sdpa cudnn": "CUDNN_ATTENTION", "sdpa flash": "FLASH_ATTENTION"}
            kinds = kinds if b.gpu else {"sdpa math": "MATH"}
            return {name: lambda kind=kind: call(kind) for name, kind in kinds.items()}

        with b.torch.no_grad():
            b.row(
                f"attention forward T={T}",
                {
                    OURS: lambda q=q, k=k, v=v: op(q, k, v, True, None, None, False),
                    **peers(lambda kind, q=q, k=k, v=v: sdpa(b, kind, q, k, v, True)),
                    **libraries(op, (q, k, v, True, None, None, False)),
                },
                flops=forward_flops,
            )

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def both(forward: Callable[[], Any], grad: Any = grad, leaves: list = leaves) -> None:
            b.torch.autograd.grad(forward(), leaves, grad)

        o, lse = op(q, k, v, True, None, None, True)
        backward = OPS["attention_backward"]
        b.row(
            f"attention backward T={T}",
            {OURS: lambda: backward(grad, q, k, v, o, lse, True, None, None)},  # noqa: B023
            flops=forward_flops * 5 // 2,
        )
        b.row(
            f"attention forward and backward T={T}",
            {
                OURS: lambda: both(lambda: op(*leaves, True, None, None, True)[0]),  # noqa: B023
                **peers(
                    lambda kind: both(
                        lambda: sdpa(b, kind, *leaves, True).transpose(1, 2)  # noqa: B023
                    )
                ),
            },
            flops=forward_flops * 7 // 2,
        )


def decode(b: Bench) -> None:
    """One query against long caches, 32 query and 8 KV heads of 128, bfloat16."""
    from llama_fast.registry import OPS

    op = OPS["attention"]
    sizes = ((1, 8192), (1, 32768), (1, 131072), (16, 8192)) if b.gpu else ((1, 600),)
    for B, S in sizes:
        H, K, D = b.size(32, 4), b.size(8, 2), b.size(128, 16)
        q = b.randn(B, 1, H, D)
        k, v = (b.randn(B, K, S, D).transpose(1, 2) for _ in "kv")
        kind = "FLASH_ATTENTION" if b.gpu else "MATH"
        with b.torch.no_grad():
            b.row(
                f"attention decode B={B} S={S}",
                {
                    OURS: lambda q=q, k=k, v=v: op(q, k, v, True, None, None, False),
                    "sdpa": lambda q=q, k=k, v=v, kind=kind: sdpa(b, kind, q, k, v, False),
                    **libraries(op, (q, k, v, True, None, None, False)),
                },
                nbytes=op.cost(q, k, v, True, None, None, False).bytes,
            )


def model_decode(b: Bench) -> None:
    """A decoding step of the 8B shape behind 1024 tokens, batch 1: bfloat16, int8 and int4. The
    step is replayed as a CUDA graph, so the host's time is in none of them; random weights."""
    from llama_fast.cli.measure import bytes_per_token
    from llama_fast.config import LlamaConfig
    from llama_fast.decode import DecodeStep
    from llama_fast.profiling.steps import random_model

    torch = b.torch
    config = LlamaConfig.preset("8b")
    if not b.gpu:
        config = dataclasses.replace(
            config, dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=96
        )
    context = b.size(1024, 8)

    def measure(form: str | None) -> None:
        model = random_model(
            config,
            layers=config.n_layers if b.gpu else 1,
            dtype=torch.bfloat16,
            device=b.device,
            quantize=form,
        )
        cache = model.new_cache(1, context + 512)
        cache.advance(context)
        step = DecodeStep(model, cache)
        token = torch.zeros(1, dtype=torch.int64, device=b.device)
        step(token)
        step(token)  # captured, where there is a GPU
        b.row(
            f"8B decode {form or 'bfloat16'}",
            {OURS: step.replay or (lambda: step(token))},
            nbytes=int(bytes_per_token(model, context)),
            graph=step.replay is not None,
        )

    failures = []
    for form in (None, "int8", "int4"):
        try:
            measure(form)
        except Exception as error:  # the other forms still run
            failures.append(f"{form or 'bfloat16'}: {type(error).__name__}: {error}")
        if b.gpu:
            torch.cuda.empty_cache()
    if failures:
        raise RuntimeError("; ".join(failures))


def cross_entropy(b: Bench) -> None:
    """V = 128,256, C = 4096, 8192 rows, both gradients; beside logits that are stored whole."""
    from llama_fast.registry import OPS

    torch, F = b.torch, b.torch.nn.functional
    N, C, V = b.size(8192, 8), b.size(4096, 32), b.size(128256, 70)
    x, weight = b.randn(N, C), b.randn(V, C, scale=C**-0.5)
    targets = torch.randint(V, (N,), device=b.device, generator=b.generator)
    op = OPS["linear_cross_entropy"]

    def whole(x: Any, weight: Any) -> Any:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    compiled = b.compiled(whole)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]

    def peak(call: Callable[[], Any]) -> int:
        if not b.gpu:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ours() -> Any:
        return op(x, weight, targets, -100, True, True, True)

    ours()
    results = (x.numel() + weight.numel()) * x.element_size()
    b.row(
        "linear_cross_entropy",
        {
            OURS: ours,
            "compile": lambda: torch.autograd.grad(compiled(*leaves), leaves),
            "eager": lambda: torch.autograd.grad(whole(*leaves), leaves),
            **{
                name: lambda call=call: torch.autograd.grad(call(), leaves)
                for name, call in libraries(op, (*leaves, targets, -100, True, True, True)).items()
            },
        },
        flops=6 * N * C * V,
        extra_memory_of_logits=(peak(ours) - results) / (N * V * x.element_size()),
    )


def graph(b: Bench) -> None:
    """Ops are captured in a CUDA graph, and its replay gives what the call gave."""
    if not b.gpu:
        return
    import llama_fast

    torch = b.torch
    x, weight = b.randn(4, 4096), b.randn(4096)
    q = b.randn(4, 1, 32, 128)
    k, v = (b.randn(4, 8, 4096, 128).transpose(1, 2) for _ in "kv")
    lengths = torch.tensor([4096, 17, 0, 2000], device=b.device)

    def step() -> tuple:
        with torch.no_grad():
            return llama_fast.rms_norm(x, weight), llama_fast.attention(q, k, v, lengths=lengths)

    step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = step()
    x.normal_()
    lengths.copy_(torch.tensor([1, 4096, 5, 0]))
    captured.replay()
    same = all(torch.equal(a, e) for a, e in zip(outputs, step(), strict=True))
    b.write({"name": "CUDA graph", "text": "replay equals the call" if same else "DIFFERS"})
    if not same:
        raise ArithmeticError("a replayed graph does not give what the call gives")


MEASURES = {
    "ceilings": [ceilings],
    "memory_bound": [memory_bound],
    "attention": [attention],
    "decode": [decode],
    "model_decode": [model_decode],
    "cross_entropy": [cross_entropy],
    "graph": [graph],
    "cuda_attention": [gpu_cuda.attention],
    "cuda_decode": [gpu_cuda.attention_decode, gpu_cuda.linear],
    "cuda_model": [gpu_cuda.model],
}

if __name__ == "__main__":
    main()
