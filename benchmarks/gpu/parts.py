"""The parts, what each of them runs, its share of the time, and the calls that they are split into.

A call of the command is a stage: each stays under ten minutes, what is right comes before what is
fast, and each begins with the build, which takes seconds where it was done.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """seconds  its share of a stage's nine minutes; what it leaves is there for those after it
    runs     "module:function" of this folder, imported in the part's own process: it takes a
             `setting.Setting`, or (setting, part) where it serves several parts
    row      seconds for one of its rows: what takes longer hangs, and its process ends
    """

    seconds: float
    runs: str
    row: float = 45


PARTS = {
    "build": Part(140, "checks:build"),
    "tests": Part(180, "checks:triton_tests"),
    "cuda_tests": Part(90, "checks:cuda_tests"),
    "graph": Part(30, "checks:graph"),
    "sanitizers": Part(90, "checks:sanitizers"),
    "attention": Part(110, "ops:measure"),
    "attention_decode": Part(70, "ops:measure"),
    "memory_bound": Part(120, "ops:measure"),
    "linear": Part(60, "ops:measure"),
    "loss": Part(40, "ops:measure"),
    "decode": Part(170, "models:decode", row=90),
    "training": Part(230, "models:training", row=150),
}
STAGES = {
    "checks": ("build", "tests", "cuda_tests", "graph", "sanitizers"),
    "kernels": ("build", "attention", "attention_decode", "memory_bound", "linear", "loss"),
    "models": ("build", "decode", "training"),
}
