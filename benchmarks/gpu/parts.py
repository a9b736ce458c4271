"""The parts, what each of them runs, and its share of the time."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """seconds  its share of the nine minutes; what it leaves is there for the parts after it
    runs     "module:function" of this folder, imported in the part's own process: it takes a
             `setting.Setting`, or (setting, part) where it serves several parts
    row      seconds for one of its rows: what takes longer hangs, and its process ends
    """

    seconds: float
    runs: str
    row: float = 30


PARTS = {
    "build": Part(105, "checks:build"),
    "tests": Part(60, "checks:triton_tests"),
    "memory_bound": Part(55, "ops:measure"),
    "attention": Part(55, "ops:measure"),
    "attention_decode": Part(30, "ops:measure"),
    "linear": Part(25, "ops:measure"),
    "loss": Part(30, "ops:measure"),
    "graph": Part(10, "checks:graph"),
    "decode": Part(55, "models:decode", row=45),
    "training": Part(80, "models:training", row=140),
    "cuda_tests": Part(40, "checks:cuda_tests"),
    "sanitizers": Part(20, "checks:sanitizers"),
}
