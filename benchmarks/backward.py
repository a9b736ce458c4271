"""The gradients of the memory-bound ops in C++ against their eager definitions and a plain copy.

    python -m benchmarks.backward [OP ...] [--dtype bfloat16] [--threads 2] [--rounds 15]

At (512, 2048) and (2048, 4096) rows and columns. A line is the median time, in turn in one process,
and how many times faster ours is than eager PyTorch and than a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

import llama_fast.ops  # noqa: F401  registers the ops
from llama_fast.bench.timing import interleaved, ratio
from llama_fast.dispatch import OPS

NAMES = ("rms_norm", "add_rms_norm", "swiglu")
SIZES = ((512, 2048), (2048, 4096))


def arguments(name: str, N: int, C: int, dtype: torch.dtype) -> tuple:
    """What the backward op of `name` takes, of N rows; gate and up are halves of one tensor."""
    g = torch.Generator().manual_seed(0)
    grad, other, x = (torch.randn(N, C, generator=g).to(dtype) for _ in range(3))
    if name == "swiglu":
        return grad, *torch.cat((other, x), -1).chunk(2, -1)
    given = grad, x, torch.ones(C, dtype=dtype), 1e-5
    return given if name == "rms_norm" else (grad, other, *given[1:])


def baselines(name: str, N: int, C: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    op, args = OPS[f"{name}_backward"], arguments(name, N, C, dtype)
    source = torch.ones(op.cost(*args).bytes // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    assert op.explain(*args).chosen == "cpu"
    return {
        "ours": lambda: op(*args),
        "eager": lambda: op.eager(*args),
        "copy": lambda: target.copy_(source),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if unknown := set(given.ops) - set(NAMES):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    torch.set_num_threads(given.threads)
    for name in given.ops:
        for N, C in SIZES:
            with torch.no_grad():
                seconds = interleaved(
                    baselines(name, N, C, getattr(torch, given.dtype)), given.rounds
                )
            said = [f"ours {statistics.median(seconds['ours']) * 1e3:.2f} ms"]
            said += [f"{ratio(seconds, other, 'ours'):.2f}× {other}" for other in ("eager", "copy")]
            print(f"{name:13s}{N}×{C:<6d}{', '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
