"""The memory-bound ops against torch.compile of their eager reference, and against a plain copy.

    python -m benchmarks.elementwise [OP ...] [--dtype bfloat16] [--threads 2] [--rounds 15]

Shapes of Llama 3.1 8B at N = 2048 tokens. A line is the median time of each contender, and how many
times faster ours is than it: `compile`, and `copy`, which moves as many bytes between two buffers
that exist already. `call` is the processor time of a call whose tensors are tiny.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable
from time import process_time

import torch

import llama_fast.ops  # noqa: F401  registers the ops
from benchmarks.timing import interleaved, ratio
from llama_fast.registry import OPS, Op, use_backend

N, C, F, H, K, D = 2048, 4096, 14336, 32, 8, 128
SMALL = {"N": 1, "C": 64, "F": 64, "H": 2, "K": 1, "D": 16}
LARGE = {"N": N, "C": C, "F": F, "H": H, "K": K, "D": D}


def arguments(name: str, dtype: torch.dtype, N: int, C: int, F: int, H: int, K: int, D: int):
    """The op's arguments, as the model gives them."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    if name == "rms_norm":
        return rows(1, N, C), rows(C), 1e-5
    if name == "add_rms_norm":
        return rows(1, N, C), rows(1, N, C), rows(C), 1e-5
    if name == "swiglu":
        return rows(1, N, 2 * F).chunk(2, dim=-1)
    if name == "linear":
        return rows(1, N, C), rows(F, C)
    q, k, v = rows(1, N, H + 2 * K, D).split((H, K, K), dim=2)
    if name == "attention":
        return q, k, v, True, None, None
    angle = torch.randn(N, D // 2)
    if name == "rope":
        return q, k, angle.cos(), angle.sin(), False
    caches = [torch.zeros(1, K, N, D, dtype=dtype).transpose(1, 2) for _ in "kv"]
    return q, k, v, angle.cos(), angle.sin(), *caches, torch.tensor([N]), False


def call_costs(op: Op, dtype: torch.dtype, repeat: int = 7) -> list[float]:
    """Seconds of processor time for a call with next to nothing to compute, `repeat` times."""
    args = arguments(op.name, dtype, **SMALL)
    seconds = timeit.repeat(lambda: op(*args), number=2000, repeat=repeat, timer=process_time)
    return [total / 2000 for total in seconds]


def contenders(
    op: Op, dtype: torch.dtype, sizes: dict[str, int] = LARGE
) -> dict[str, Callable[[], None]]:
    args = arguments(op.name, dtype, **sizes)
    source = torch.ones(op.cost(*args).bytes // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    compiled = torch.compile(op.eager)
    return {
        "ours": lambda: op(*args),
        "compile": lambda: compiled(*args),
        "copy": lambda: target.copy_(source),
    }


def main() -> None:
    names = ["rms_norm", "add_rms_norm", "swiglu", "rope", "kv_append"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=names[:-1], help=", ".join(names))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if unknown := set(given.ops) - set(names):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    for name in given.ops:
        with torch.no_grad(), use_backend("cpu", strict=True):
            seconds = interleaved(contenders(OPS[name], dtype), given.rounds)
            call = min(call_costs(OPS[name], dtype))
        said = [f"ours {statistics.median(seconds['ours']) * 1e3:.2f} ms"]
        for other in ("compile", "copy"):
            median = statistics.median(seconds[other]) * 1e3
            said.append(f"{other} {median:.2f} ms ({ratio(seconds, other, 'ours'):.2f}×)")
        print(f"{name:13s}{given.dtype:9s} {', '.join(said)}, call {call * 1e6:.1f} µs", flush=True)


if __name__ == "__main__":
    main()
