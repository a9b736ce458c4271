"""linear and its gradients against torch's products, and against the machine's peak rates.

    python -m benchmarks.linear [WAY ...] [--dtype bfloat16] [--rows 1 16 17 32 128 512]
                                [--shape C_out C_in] [--threads 2] [--rounds 9]

A line is a number of rows: the GFLOP/s of ours, of torch's product of the same dtype and of torch's
in float32, medians of interleaved calls; and ours as a share of what the machine can do at most,
multiply-adds and, for few rows, bytes of the weight read a second.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from llama_fast.bench import roofline
from llama_fast.bench.timing import interleaved
from llama_fast.dispatch import Op, use_backend
from llama_fast.ops.linear import BACKWARD_WEIGHT, BACKWARD_X, OP

WAYS = {
    "linear": (OP, lambda x, weight, grad: (x, weight)),
    "backward_x": (BACKWARD_X, lambda x, weight, grad: (grad, weight)),
    "backward_weight": (BACKWARD_WEIGHT, lambda x, weight, grad: (grad, x)),
}


def baselines(op: Op, args: tuple, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    own = tuple(a.to(dtype) for a in args)
    return {
        "ours": lambda: op(*own),
        "torch": lambda: op.eager(*own),
        "float32": lambda: op.eager(*args),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 17, 32, 128, 512])
    parser.add_argument("--shape", nargs=2, type=int, default=[2048, 2048], metavar="C")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if unknown := set(given.ways) - set(WAYS):
        parser.error(f"no way {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    torch.set_num_threads(given.threads)
    dtype, (C_out, C_in) = getattr(torch, given.dtype), given.shape
    peak = roofline.multiply_add_rate(pairs=dtype is torch.bfloat16)
    read = roofline.read_bandwidth()
    print(f"peak rates: {peak / 1e9:.0f} GFLOP/s, read {read / 1e9:.1f} GB/s")
    for way in given.ways:
        op, of = WAYS[way]
        for M in given.rows:
            args = of(torch.randn(M, C_in), torch.randn(C_out, C_in), torch.randn(M, C_out))
            with torch.no_grad(), use_backend("cpu", strict=True):
                seconds = interleaved(baselines(op, args, dtype), given.rounds)
                how = op.explain(*(a.to(dtype) for a in args)).how
            median = {name: statistics.median(times) for name, times in seconds.items()}
            flops, weight = 2 * M * C_out * C_in, C_out * C_in * dtype.itemsize
            rates = ", ".join(f"{name} {flops / t / 1e9:.0f}" for name, t in median.items())
            share = f"{flops / median['ours'] / peak:.2f} of the multiply-adds"
            if M <= 32:
                share += f", {weight / median['ours'] / read:.2f} of the read"
            print(f"{way:16s}{M:5d} rows  {rates} GFLOP/s; {share}; {how}", flush=True)


if __name__ == "__main__":
    main()
