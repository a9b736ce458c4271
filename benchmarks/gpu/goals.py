"""The project's targets on GPUs, as what a row must reach: ratios of one run, to the measured
peak rates or to somebody else's time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_fast.bench.results import Goal, Row
from llama_fast.config import LlamaConfig

CUDNN, COMPILED = "torch cudnn", "torch.compile"


@dataclass(frozen=True)
class Target:
    """A goal that has not been measured: `of` takes the row and our baseline of it."""

    what: str
    needed: float
    of: Callable[[Row, str], float | None]
    at_most: bool = False

    def measured(self, row: Row) -> Goal:
        own = row.own()
        value = None if own is None else self.of(row, own)
        return Goal(self.what, self.needed, value, self.at_most)


def bandwidth(part: float) -> Target:
    return Target("of bandwidth", part, lambda row, own: row.share(own))


def faster(than: str, times: float = 1.0) -> Target:
    return Target(f"× {than}", times, lambda row, own: row.times(than, own))


def triton_alone(than: str, times: float) -> Target:
    """What a machine that has no CUDA C++ kernels gets."""
    return Target(f"× {than}, Triton alone", times, lambda row, own: row.times(than, "triton"))


def host_time() -> Target:
    def of(row: Row, own: str) -> float | None:
        return row.host[own] / row.seconds(own) if own in row.host else None

    return Target("of the kernel's time on the host", 1.0, of, at_most=True)


def memory_of_logits(config: LlamaConfig, rows: int, part: float) -> Target:
    """What the call holds beside its results, over the size of the logits in bfloat16."""
    results = 2 * config.dim * (rows + config.vocab_size)

    def of(row: Row, own: str) -> float | None:
        if own not in row.memory:
            return None
        return (row.memory[own] - results) / (2 * rows * config.vocab_size)

    return Target("of the logits' memory", part, of, at_most=True)
