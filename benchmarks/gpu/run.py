"""Runs the parts one after another, each in a process of its own, and keeps what they find."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama_fast.bench import machine, results
from llama_fast.bench import roofline as ceilings
from llama_fast.bench.report.page import targets
from llama_fast.bench.results import Row
from llama_fast.errors import BackendError, ResultsError

from .parts import PARTS
from .setting import KERNELS, Setting

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LEAST = 5.0  # seconds: with less left, nothing more is begun
VERSIONS = ("triton", "transformers", "liger-kernel", "flash-attn", "flashinfer-python")


@dataclass
class Ended:
    """How a part's process ended: why it failed, or nothing; and when it was killed by what it ran,
    the contender that is to blame, as far as that is known."""

    why: str = ""
    died: bool = False
    culprit: str | None = None


# Starts a part's process: (part, setting, seconds) → its rows as they come, and how it ended.
Start = Callable[[str, Setting, float], Iterator["Row | Ended"]]


def run_all(parts: list[str], device: str, seconds: float, target: Path | None) -> list[str]:
    """Runs the parts; returns those that failed.

    target  results file; else benchmarks/results/<device>.json, of a rehearsal none
    Raises BackendError where torch finds no GPU, ResultsError where the file is another machine's.
    """
    begin = time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch finds no GPU here; --device cpu rehearses without one")
    print("measuring the ceilings", flush=True)
    found = ceilings.measure(device)
    torch.cuda.empty_cache()
    keep = Keeper(device, found, target)
    setting = Setting(device, ROOT / "build" / "gpu.jsonl", found)
    setting.lines.parent.mkdir(exist_ok=True)
    whole, spent, failed = sum(PARTS[part].seconds for part in parts), 0.0, []
    for part in parts:
        spent += PARTS[part].seconds
        start = time.monotonic()
        why = run_part(part, setting, begin + seconds * spent / whole, keep.add)
        took = time.monotonic() - start
        text = f"FAILED after {took:.0f} s: {why}" if why else f"done, {took:.0f} s"
        keep.add(Row(f"part {part}", f"part {part}", "", notes=[text]))
        if why:
            failed.append(part)
    print(f"\n{targets(list(keep.rows.values()))}\n", flush=True)
    print(f"results: {keep.path or 'not kept'}" + (f"; FAILED: {', '.join(failed)}" * bool(failed)))
    return failed


def run_part(
    part: str,
    setting: Setting,
    deadline: float,
    keep: Callable[[Row], None],
    start: Start | None = None,
) -> str:
    """Runs one part until `deadline` on time.monotonic(); returns why it failed, or nothing.

    Where one of our kernels kills the process, or hangs, the rest is measured without it: the one
    that is to blame where that is known, else one after the other.
    """
    setting = dataclasses.replace(setting, without={}, done=[])
    whys: list[str] = []
    while True:
        left = deadline - time.monotonic()
        if left < LEAST:
            return "; ".join([*whys, "no time was left"])
        ended = Ended()
        for one in (start or start_process)(part, setting, left):
            if isinstance(one, Ended):
                ended = one
            else:
                setting.done.append(one.name)
                keep(one)
        if ended.why:
            whys.append(ended.why)
        others = [name for name in KERNELS if name not in setting.without]
        culprit = ended.culprit or next(iter(others), None)
        if not ended.died or culprit is None or culprit in setting.without:
            return "; ".join(whys)
        setting.without[culprit] = f"it is left out, since a process ended with it: {ended.why}"


def start_process(part: str, setting: Setting, seconds: float) -> Iterator[Row | Ended]:
    setting.lines.unlink(missing_ok=True)
    file, log = (setting.lines.with_name(f"gpu-{part}.{end}") for end in ("json", "log"))
    setting.save(file, part)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if not setting.gpu:
        environment["TRITON_INTERPRET"] = "1"
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "--part", str(file)],
            cwd=ROOT, env=environment, start_new_session=True, stdout=said, stderr=said,
        )  # fmt: skip
        end, read, last = time.monotonic() + seconds, Lines(setting.lines), {}
        stopped = False
        try:
            while process.poll() is None and not stopped:
                stopped = time.monotonic() > end
                for last in read.new():
                    if "row" in last:
                        yield Row.from_record(last["row"])
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # a group of its own: its compilers end too
                process.wait()
    for last in read.new():
        if "row" in last:
            yield Row.from_record(last["row"])
    text = last_lines(log.read_text(encoding="utf-8", errors="replace"))
    if stopped:
        where = f" in {last['begun']}" if "begun" in last else ""
        yield Ended(f"stopped after {seconds:.0f} s{where}; {text}")
    elif "begun" in last or "lost" in last:
        where = last.get("begun") or last["why"]
        yield Ended(f"its process ended at {where}; {text}", True, last.get("lost"))
    else:
        yield Ended("" if process.returncode == 0 else text)


@dataclass
class Lines:
    """What a process has written to a file since it was last asked, line by line."""

    path: Path
    place: int = field(default=0, init=False)

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.place)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    return
                self.place += len(line)
                yield json.loads(line)


def last_lines(said: str) -> str:
    return " | ".join(line.strip()[:300] for line in said.strip().splitlines()[-6:])


class Keeper:
    """Prints rows and writes them to the results file, each as it comes."""

    def __init__(self, device: str, found: ceilings.Ceilings, target: Path | None) -> None:
        self.machine = machine.describe(found.isa)
        self.rows: dict[str, Row] = {}
        self.run = {
            "date": results.today(),
            "threads": found.threads,
            "ceilings": dataclasses.asdict(found),
            "versions": machine.versions(*VERSIONS),
        }
        self.path = target
        if target is None and device == "cuda":
            self.path = RESULTS / f"{machine.file_name(self.machine, 0, device)}.json"
        if self.path is not None and self.path.exists():
            self._look_at_the_old(target)

    def _look_at_the_old(self, target: Path | None) -> None:
        try:
            same = results.load(self.path).machine == self.machine
        except ResultsError:
            same = False
        if not same and target is not None:
            raise ResultsError(f"{target} is not of this machine; name another file with --json")
        if not same:  # a GPU of the same name in another machine: its samples are not these
            print(f"{self.path} is of another machine, and is begun anew")
            self.path.unlink()

    def add(self, row: Row) -> None:
        row.measured_with = self.run
        self.rows[row.name] = row
        print(line(row), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            results.save(self.path, self.machine, [row])


def line(row: Row) -> str:
    """The row in one line: times, the part of the ceiling, and how many times faster our fastest
    is than the others."""
    if not row.samples:
        return f"== {row.what}: {'; '.join(row.notes)}"
    own = row.own()
    cells = []
    for name in row.samples:
        seconds, share, times = row.seconds(name), row.share(name), row.times(name, own or name)
        words = [f"{name} {1e6 * seconds:,.1f} µs"]
        if share is not None:
            words.append(f"{share:.0%} {row.ceiling}")
        if own is not None and name != own:
            words.append(f"{times:.2f} ×")
        cells.append(" ".join(words))
    said = [f"   {row.name}: {', '.join(cells)}"]
    said += [f"      {goal}: {goal.value:.3g}" for goal in row.goals if goal.holds is False]
    said += [f"      {note}" for note in row.notes]
    return "\n".join(said)
