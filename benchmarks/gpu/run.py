"""Runs the parts one after another, each in a process of its own, and keeps what they find."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker import context
from llama_fast.bench import machine, results, roofline
from llama_fast.bench.report.page import targets
from llama_fast.bench.results import Row
from llama_fast.errors import BackendError, ResultsError

from .part import enter
from .parts import PARTS
from .setting import KERNELS, Setting

FOLDER = Path("build", "gpu")
LOG = "log.txt"
LEAST = 5.0  # seconds: with less left, nothing more is begun
VERSIONS = ("triton", "transformers", "liger-kernel", "flash-attn", "flashinfer-python")


@dataclass
class Ended:
    """How a part's process ended: why it failed, or nothing; and when it was killed by what it ran,
    the baseline that is to blame, as far as that is known."""

    why: str = ""
    died: bool = False
    culprit: str | None = None


# Starts a part's process: (part, setting, seconds) → its rows as they come, and how it ended.
Start = Callable[[str, Setting, float], Iterator["Row | Ended"]]


def run_all(parts: list[str], device: str, seconds: float, folder: Path) -> list[str]:
    """Runs the parts; returns those that failed.

    folder  where all is kept: rows in <device>.json, what is said in log.txt, and what the parts
            write there; it is made, and what it has stays
    Raises BackendError where torch finds no GPU.
    """
    begin = time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch finds no GPU here; --device cpu rehearses without one")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a part's process imports Triton
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    say = Log(folder / LOG).say
    say(f"{', '.join(parts)}: {seconds:.0f} s at most, all that is to be kept is in {folder}")
    found = roofline.measure(device)
    torch.cuda.empty_cache()
    keep = Keeper(device, found, folder, say)
    whole, spent, failed = sum(PARTS[part].seconds for part in parts), 0.0, []
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(device, Path(temporary, "lines.jsonl"), folder, found)
        for part in parts:
            spent += PARTS[part].seconds
            start = time.monotonic()
            why = run_part(part, setting, begin + seconds * spent / whole, keep.add)
            took = time.monotonic() - start
            text = f"FAILED after {took:.0f} s: {why}" if why else f"done, {took:.0f} s"
            keep.add(Row(f"part {part}", f"part {part}", "", notes=[text]))
            if why:
                failed.append(part)
    say(f"\n{targets(list(keep.rows.values()))}\n")
    say(f"results: {keep.path}" + (f"; FAILED: {', '.join(failed)}" * bool(failed)))
    return failed


@dataclass
class Log:
    """Prints lines, and adds them to a file that parts write to as well."""

    path: Path

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


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


def start_process(
    part: str, setting: Setting, seconds: float, enter: Callable[[str, str], None] = enter
) -> Iterator[Row | Ended]:
    """Runs a part in a process forked from one that has imported torch already."""
    setting.lines.unlink(missing_ok=True)
    file, log = setting.lines.with_name(f"{part}.json"), setting.folder / LOG
    setting.save(file, part)
    said_before = log.stat().st_size if log.exists() else 0
    process = context.Process(target=enter, args=(str(file), str(log)))
    process.start()
    end, read, last = time.monotonic() + seconds, Lines(setting.lines), {}
    stopped = False
    try:
        while process.is_alive() and not stopped:
            stopped = time.monotonic() > end
            for last in read.new():
                if "row" in last:
                    yield Row.from_record(last["row"])
            time.sleep(0.2)
    finally:
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers and tests end too
            except ProcessLookupError:  # it has not yet got so far as to have a group
                process.kill()
        process.join()
    for last in read.new():
        if "row" in last:
            yield Row.from_record(last["row"])
    text = last_lines(log.read_bytes()[said_before:].decode(errors="replace"))
    if stopped:
        where = f" in {last['begun']}" if "begun" in last else ""
        yield Ended(f"stopped after {seconds:.0f} s{where}; {text}")
    elif "begun" in last or "lost" in last:
        where = last.get("begun") or last["why"]
        yield Ended(f"its process ended at {where}; {text}", True, last.get("lost"))
    else:
        yield Ended("" if process.exitcode == 0 else text)


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
    """Where the process has ended, if faulthandler says so, and else what it said last."""
    lines = said.strip().splitlines()
    ends = ("Timeout (", "Fatal Python error")
    dumps = [number for number, line in enumerate(lines) if line.startswith(ends)]
    lines = lines[dumps[-1] : dumps[-1] + 6] if dumps else lines[-6:]
    return " | ".join(line.strip()[:300] for line in lines)


class Keeper:
    """Says rows and writes them to the results file, each as it comes."""

    def __init__(
        self, device: str, found: roofline.Roofline, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.machine = machine.describe(found.isa)
        self.rows: dict[str, Row] = {}
        self.say = say
        self.run = {
            "date": results.today(),
            "threads": found.threads,
            "roofline": dataclasses.asdict(found),
            "versions": machine.versions(*VERSIONS),
        }
        name = machine.file_name(self.machine, 0, device) if device == "cuda" else "rehearsal"
        self.path = folder / f"{name}.json"
        if self.path.exists():
            self._look_at_the_old()

    def _look_at_the_old(self) -> None:
        try:
            same = results.load(self.path).machine == self.machine
        except ResultsError:
            same = False
        if not same:  # a GPU of the same name in another machine: its samples are not these
            before = self.path.with_suffix(".before.json")
            self.say(f"{self.path} is of another machine: it is now {before.name}")
            self.path.replace(before)

    def add(self, row: Row) -> None:
        row.measured_with = self.run
        self.rows[row.name] = row
        self.say(line(row))
        results.save(self.path, self.machine, [row])


def line(row: Row) -> str:
    """The row in one line: times, the part of the peak rate, and how many times faster our fastest
    is than the others."""
    if not row.samples:
        return f"== {row.what}: {'; '.join(row.notes)}"
    own = row.own()
    cells = []
    for name in row.samples:
        seconds, share, times = row.seconds(name), row.share(name), row.times(name, own or name)
        words = [f"{name} {1e6 * seconds:,.1f} µs"]
        if share is not None:
            words.append(f"{share:.0%} {row.bound}")
        if own is not None and name != own:
            words.append(f"{times:.2f} ×")
        cells.append(" ".join(words))
    said = [f"   {row.name}: {', '.join(cells)}"]
    said += [f"      {goal}: {goal.value:.3g}" for goal in row.goals if goal.holds is False]
    said += [f"      {note}" for note in row.notes]
    return "\n".join(said)
