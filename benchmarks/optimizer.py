"""AdamW's step against torch's fused one and against a plain copy.

    python -m benchmarks.optimizer [--elements 67108864] [--threads 2] [--rounds 7]

Of one tensor: with float32 weights, with bfloat16 weights rounded stochastically, and with 8-bit
moments besides. A line is the median time, the bytes that a step must move (the gradient read, all
else read and written) a second, their share of what a copy moves, all in turn in one process, and
how many times faster than `torch.optim.AdamW(fused=True)` of as many float32 weights it is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from llama_fast.bench import roofline
from llama_fast.bench.timing import interleaved, ratio
from llama_fast.dispatch import OPS, use_backend
from llama_fast.ops.quantized_moments import blocks_of

NUMBERS = (3, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0)


def arguments(n: int, dtype: torch.dtype, eight_bits: bool) -> tuple:
    """What a step of n weights takes."""
    param = torch.ones(n, dtype=dtype)
    grad = torch.full_like(param, 0.5)
    if not eight_bits:
        moments, scales = [torch.full((n,), 0.1) for _ in "mv"], (None, None)
    else:
        moments = [torch.full((n,), 3, dtype=kind) for kind in (torch.int8, torch.uint8)]
        scales = [torch.full((blocks_of(n),), 0.1) for _ in "mv"]
    return param, grad, *moments, *NUMBERS, 7, *scales


def torch_step(n: int, dtype: torch.dtype) -> Callable[[], object]:
    param = torch.ones(n, dtype=dtype)
    param.grad = torch.full_like(param, 0.5)
    return torch.optim.AdamW([param], lr=1e-3, weight_decay=0.1, fused=True).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**26)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    op, n = OPS["adamw"], given.elements
    source = torch.ones(n, dtype=torch.float32)
    target = torch.ones_like(source)
    copied, best = source.nbytes + target.nbytes, roofline.copy_bandwidth()
    kinds = {
        "float32": (torch.float32, False),
        "bfloat16": (torch.bfloat16, False),
        "bfloat16, 8-bit moments": (torch.bfloat16, True),
    }
    for name, (dtype, eight_bits) in kinds.items():
        args = arguments(n, dtype, eight_bits)
        with torch.no_grad(), use_backend("cpu", strict=True):
            seconds = interleaved(
                {
                    "ours": lambda args=args: op(*args),
                    "torch": torch_step(n, torch.float32),
                    "copy": lambda: target.copy_(source),
                },
                given.rounds,
            )
        ours, copy = (statistics.median(seconds[each]) for each in ("ours", "copy"))
        rate, peak = op.cost(*args).bytes / ours, copied / copy
        print(
            f"{name:24s} {ours * 1e3:.1f} ms, {rate / 1e9:.1f} GB/s, {rate / peak:.2f} of a copy's "
            f"{peak / 1e9:.1f}, {rate / best:.2f} of the peak copy's {best / 1e9:.1f}, "
            f"{ratio(seconds, 'torch', 'ours'):.2f}× torch's fused",
            flush=True,
        )


if __name__ == "__main__":
    main()
