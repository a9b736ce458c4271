"""Tests in processes of their own: each test is kept as it ends, whatever ends its process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from llama_fast.dispatch import OPS, backends, use_backend

from . import pytest_lines
from .setting import Setting

ROOT = Path(__file__).parents[2]
TESTS = "tests.txt"
SAID_EVERY = 3.0  # seconds
SHOWN = 20  # failures of a selection that its row has; the file has all
NOTHING_SELECTED = 5  # pytest's exit code


class Selection(NamedTuple):
    """files      that pytest is given, with spaces between
    which      of their tests, as pytest -k takes it
    processes  among which they are divided
    options    of pytest, with spaces between"""

    files: str
    which: str
    processes: int = 1
    options: str = ""


def run_tests(setting: Setting, selections: list[Selection], backend: str) -> list[str]:
    """Runs them side by side, those of attention first; returns what failed. Every test has a line
    in TESTS. Where there is no pytest, the cases of the backend's ops are run without it."""
    if not importlib.util.find_spec("pytest"):
        return check_cases(setting, backend)
    tallies = [Tally(setting, f"tests of {s.files}: {s.which}") for s in selections]
    jobs = [
        (tally, selection, share)
        for tally, selection in zip(tallies, selections, strict=True)
        for share in range(selection.processes)
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: run_share(*job), jobs))
    return [failure for tally in tallies for failure in tally.end()]


@dataclass
class Tally:
    """What has come of the tests of a selection so far: a row of results, said anew from time to
    time, so that one that is killed has it."""

    setting: Setting
    what: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, seconds: float, test: str) -> None:
        with self.lock:
            self.counts[outcome] += 1
            if outcome == "failed":
                self.failures.append(test)
            with (self.setting.folder / TESTS).open("a", encoding="utf-8") as file:
                file.write(f"{outcome} {seconds:.2f} s {test}\n")
            if outcome == "failed" or time.monotonic() - self.said > SAID_EVERY:
                self._say(" so far")

    def fail(self, why: str) -> None:
        with self.lock:
            self.failures.append(why)

    def end(self) -> list[str]:
        """What failed."""
        with self.lock:
            if not self.counts and not self.failures:
                self.failures.append("no test was selected")
            self._say("")
        return [f"{self.what}: {failure}" for failure in self.failures]

    def _say(self, so_far: str) -> None:
        self.said = time.monotonic()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        text = f"{counts or 'none'} in {self.said - self.begun:.0f} s{so_far}"
        self.setting.say(self.what, text, *self.failures[:SHOWN])


def run_share(tally: Tally, selection: Selection, share: int) -> None:
    """Runs one process's tests of a selection."""
    lines, options = pytest_lines.__name__, ["--maxfail=10", "--tb=no", "-p", "no:cacheprovider"]
    options += selection.options.split()
    if selection.processes > 1:
        options += ["--share", f"{share}/{selection.processes}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *selection.files.split(), "-k", selection.which,
         "-p", lines, *options],
        cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    running, rest, told = "", [], False
    for line in process.stdout:
        mark, _, said = line.rstrip("\n").partition(" ")
        if mark == pytest_lines.BEGINS:
            running = said
        elif mark == pytest_lines.ENDS:
            running = ""
            outcome, seconds, test = said.split(" ", 2)
            tally.add(outcome, float(seconds), test)
            told = told or outcome == "failed"
        elif line.strip():
            rest.append(line.rstrip())
    code = process.wait()
    # Of fewer tests than processes, some have none; and what could not be collected has a line.
    usual = told or (code == NOTHING_SELECTED and selection.processes > 1)
    if code < 0 or (code > 1 and not usual) or running:
        where = f" in {running}" if running else ""
        tally.fail(f"its process ended with code {code}{where}: {' | '.join(rest[-6:])}")


def check_cases(setting: Setting, backend: str) -> list[str]:
    """Every case of every op that the backend has, against float64, without pytest: forward passes
    alone."""
    from tests.ops.oracle import assert_accurate, of_op, run_poisoned

    rows, tally = backends()[backend].implementations, Tally(setting, f"op tests of {backend}")
    for name, op in sorted(OPS.items(), key=lambda item: "attention" not in item[0]):
        for case in op.cases() if op.cases and name in rows else ():
            for dtype in case.dtypes:
                start, test = time.monotonic(), f"{name} {case} {dtype}"
                args = case.make(torch.Generator().manual_seed(0), dtype, setting.device)
                if rows[name].unsupported(*args):
                    continue
                outcome = "passed"
                try:
                    with use_backend(backend, strict=True):
                        actual = run_poisoned(op, args)
                    assert_accurate(actual, of_op(op, args), test)
                except Exception as error:
                    outcome, test = "failed", f"{test}: {error}"[:300]
                tally.add(outcome, time.monotonic() - start, test)
    return tally.end()
