"""The memory-bound ops against torch.compile of their eager reference, and against a plain copy.

    python -m benchmarks.elementwise [OP ...] [--dtype bfloat16] [--threads 2] [--rounds 15]

Shapes of Llama 3.1 8B at N = 2048 tokens. A line is the median time of each baseline, and how many
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
from llama_fast.bench.shapes import Work, problem_shapes
from llama_fast.bench.timing import interleaved, ratio
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, Op, use_backend

# The shape and the number of tokens.
Size = tuple[LlamaConfig, int]
LARGE: Size = (LlamaConfig.preset("8b"), 2048)
SMALL: Size = (
    LlamaConfig(
        dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=64, vocab_size=64
    ),
    1,
)


def arguments(name: str, dtype: torch.dtype, size: Size) -> tuple:
    """The op's arguments, as the model gives them; of its first layer where there are several."""
    config, tokens = size
    return next(iter(problem_shapes(name, config, Work.prefill(tokens), dtype=dtype).values()))(0)


def call_costs(op: Op, dtype: torch.dtype, repeat: int = 7) -> list[float]:
    """Seconds of processor time for a call with next to nothing to compute, `repeat` times."""
    args = arguments(op.name, dtype, SMALL)
    seconds = timeit.repeat(lambda: op(*args), number=2000, repeat=repeat, timer=process_time)
    return [total / 2000 for total in seconds]


def baselines(op: Op, dtype: torch.dtype, size: Size = LARGE) -> dict[str, Callable[[], None]]:
    args = arguments(op.name, dtype, size)
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
            seconds = interleaved(baselines(OPS[name], dtype), given.rounds)
            call = min(call_costs(OPS[name], dtype))
        said = [f"ours {statistics.median(seconds['ours']) * 1e3:.2f} ms"]
        for other in ("compile", "copy"):
            median = statistics.median(seconds[other]) * 1e3
            said.append(f"{other} {median:.2f} ms ({ratio(seconds, other, 'ours'):.2f}×)")
        print(f"{name:13s}{given.dtype:9s} {', '.join(said)}, call {call * 1e6:.1f} µs", flush=True)


if __name__ == "__main__":
    main()
