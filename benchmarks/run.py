"""Rows one after another, with the machine's peak rates, into a results file and a table."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.table import show, table_of
from benchmarks.worker import Worker
from llama_fast.bench import machine, results, roofline
from llama_fast.bench.results import Row
from llama_fast.bench.roofline import Roofline

RESULTS = Path(__file__).parent / "results"
RATES = {"read": "GB/s", "copy": "GB/s", "float32": "GFLOP/s", "bfloat16": "GFLOP/s"}


class RooflineProbe:
    """Measures the peak rates again and again, in a process of its own, and keeps the best: other
    programs can only make one look lower."""

    def __init__(self) -> None:
        self.highest: dict[str, float] = {}

    def measure(self) -> Roofline:
        roofline.forget()
        found = roofline.measure("cpu")
        for name in RATES:
            if (rate := getattr(found, name)) is not None:
                self.highest[name] = max(rate, self.highest.get(name, 0.0))
        return dataclasses.replace(found, **self.highest)


def chosen(rows: Iterable[str], asked: list[str] | None) -> list[str]:
    """The names asked for, or all of them. Raises ValueError for one that is no row's."""
    known = list(rows)
    if unknown := [name for name in asked or () if name not in known]:
        raise ValueError(f"no row {', '.join(unknown)}; the rows are {', '.join(known)}")
    return known if asked is None else asked


def measure(
    rows: dict[str, Callable[[], Row]],
    names: list[str],
    given: argparse.Namespace,
    console: Console,
    **measured_with: Any,
) -> None:
    """Measures the rows of these names, each shown and saved as soon as it is there.

    given          `threads`, `shape`, and `json`, the file, or None for the machine's own
    measured_with  what a row says besides of how it was measured, such as versions
    """
    done: list[Row] = []
    with Worker(RooflineProbe, threads=given.threads) as probe:
        say("measuring the peak rates")
        found: Roofline = probe.ask("measure")
        where = machine.describe(found.isa)
        console.print(_roofline_line(where, found), markup=False)
        path = given.json or RESULTS / f"{machine.file_name(where, given.threads)}.json"
        for name in names:
            if done:
                found = probe.ask("measure")
            row = rows[name]()
            row.measured_with = {
                "date": results.today(),
                "shape": given.shape,
                "threads": given.threads,
                "roofline": dataclasses.asdict(found),
                **measured_with,
            }
            done.append(row)
            show(console, row)
            results.save(path, where, done)
    if len(done) > 1:
        console.print(table_of(done))
    console.print(f"written to {path}", markup=False)


def say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def _roofline_line(where: dict[str, Any], roofline: Roofline) -> str:
    said = [f"{where['cpu']}, {roofline.threads} threads, {roofline.isa or 'no C++ kernels'}"]
    for name, unit in RATES.items():
        rate = getattr(roofline, name)
        said.append(f"{name} {rate / 1e9:.1f} {unit}" if rate else f"{name} not measured")
    return " · ".join(said)
