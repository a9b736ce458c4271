"""What a measurement leaves behind: rows with every sample, and the files that keep them.

A row is some piece of work and the baselines that took turns at it. A results file is of one
machine, {"machine", "runs", "rows"}: each row names the run that it was measured in (date, threads,
peak rates, versions), so a later run of some rows may update those and keep the others.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import JSON_ERRORS, ResultsError, json_fault
from ..utils.files import atomic_file
from .timing import TOO_BUSY, TOO_NOISY, ratio, spread

OURS = "llama_fast"
# Baselines that are this package: as a whole, or a backend of its own by its name.
OWN = (OURS, "cpu", "cuda", "triton")
# Baselines that are no rivals: the machine itself, at as many bytes or FLOPs as the work takes.
COPY, READ, MULTIPLY_ADDS = "copy", "plain read", "multiply-adds"
YARDSTICKS = (COPY, READ, MULTIPLY_ADDS)


@dataclass
class Goal:
    """One of the project's targets: `value` as measured, None where it could not be."""

    what: str
    needed: float
    value: float | None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.needed if self.at_most else self.value >= self.needed

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.needed:g} {self.what}"


@dataclass
class Row:
    """One piece of work, and how long each baseline took for it.

    name     unique in a file; what: the same for a reader
    unit     of the rates: work per second, such as tokens; or of the samples where work is None
    work     what one sample does, the same for all baselines
    samples  of each baseline: seconds, or already in `unit`
    others   part of the processors' time that other programs took meanwhile; None: not known
    missing  who could not take part, and why
    call     of a single op: its "op", "problem", "shape", "work", "dtype" and "pass", and the
             numbers of "tokens" and "keys"; empty for anything else
    bytes, flops  what one sample must move and compute at least; None: not known
    bound    "read", "copy", "float32", "bfloat16" or "int8": what bounds the work
    at_best  seconds that one sample takes at that peak rate; None where it was not measured
    errors   of each baseline, against a float64 reference: the root mean square of the difference
             over that of the reference
    host     seconds of the host that a call costs each baseline, its kernel apart
    memory   bytes that a call of each baseline holds at its peak beyond what was held before
    """

    name: str
    what: str
    unit: str
    work: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    others: float | None = None
    goals: list[Goal] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    bound: str = ""
    at_best: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    measured_with: dict[str, Any] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """Of each baseline, in `unit`."""
        found = {name: statistics.median(samples) for name, samples in self.samples.items()}
        return found if self.work is None else {n: self.work / x for n, x in found.items()}

    def figures(self, baseline: str) -> list[str]:
        """For a line of a table: time, spread, GB/s, GFLOP/s, part of the peak rate, × eager."""
        seconds, share = self.seconds(baseline), self.share(baseline)
        eager = self.times("eager", baseline)
        return [
            f"{seconds * 1e6:,.1f} µs" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms",
            f"{self.spreads()[baseline]:.0%}",
            f"{self.bytes / seconds / 1e9:,.1f}",
            f"{self.flops / seconds / 1e9:,.1f}",
            "" if share is None else f"{share:.0%} {self.bound}",
            "" if eager is None else f"{eager:.2f}",
        ]

    def seconds(self, baseline: str) -> float:
        """The median of its samples; they must be seconds."""
        return statistics.median(self.samples[baseline])

    def spreads(self) -> dict[str, float]:
        return {name: spread(samples) for name, samples in self.samples.items()}

    def share(self, baseline: str) -> float | None:
        """How near it comes to the peak rate that bounds the work; None where that is not known."""
        return None if self.at_best is None else self.at_best / self.seconds(baseline)

    def times(self, slow: str, fast: str) -> float | None:
        """How many times faster `fast` is than `slow`; None where one of them took no part."""
        if not {slow, fast} <= self.samples.keys():
            return None
        return ratio(self.samples, slow, fast)

    def own(self) -> str | None:
        """The fastest baseline that is this package; None where there is none."""
        mine = [name for name in OWN if name in self.samples]
        return min(mine, key=self.seconds, default=None)

    def noisy(self, *baselines: str) -> bool:
        """Whether figures of these baselines say little."""
        spreads = self.spreads()
        busy = self.others is not None and self.others > TOO_BUSY
        return busy or any(spreads[name] > TOO_NOISY for name in baselines)

    @property
    def too_noisy(self) -> list[str]:
        """Why these figures say little, in sentences; nothing where they do."""
        why = [
            f"the samples of {name} spread over {part:.0%} of their median"
            for name, part in self.spreads().items()
            if part > TOO_NOISY
        ]
        if self.others is not None and self.others > TOO_BUSY:
            why.append(f"other programs took {self.others:.0%} of the processors' time")
        return why

    def record(self) -> dict[str, Any]:
        """For a file: what is empty is left out, and what a reader would reckon is there."""
        found = {key: value for key, value in asdict(self).items() if value not in (None, {}, [])}
        if self.goals:
            found["goals"] = [
                {**asdict(goal), "text": str(goal), "holds": goal.holds} for goal in self.goals
            ]
        return {
            **found,
            "medians": self.medians(),
            "spreads": self.spreads(),
            "too_noisy": self.too_noisy,
        }

    @classmethod
    def from_record(cls, found: dict[str, Any]) -> Row:
        """Raises ResultsError for what `record` does not make."""
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            row = cls(**{key: value for key, value in found.items() if key in known})
            row.goals = [Goal(g["what"], g["needed"], g["value"], g["at_most"]) for g in row.goals]
        except (TypeError, KeyError, AttributeError) as error:
            raise ResultsError(
                f"a row of results is malformed ({type(error).__name__}: {error}); measure again"
            ) from None
        return row


@dataclass
class Results:
    """Of one file: the machine as `llama_fast.bench.machine.describe` says it, and rows by name."""

    machine: dict[str, Any]
    rows: dict[str, Row]


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def save(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """Writes the results file; rows of an earlier run of other names stay.

    Raises ResultsError when the file is of another machine, no results file, or cannot be written.
    """
    merged = earlier(path, machine) | {row.name: row for row in rows}
    runs: list[dict[str, Any]] = []
    records = {}
    for name, row in merged.items():
        record = rounded(row.record())
        run = record.pop("measured_with", {})
        if run not in runs:
            runs.append(run)
        records[name] = {"run": runs.index(run), **record}
    content = {"machine": machine, "runs": runs, "rows": records}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # A list of numbers or words is one line.
    text = re.sub(r"\[[^][{}]+\]", lambda match: " ".join(match[0].split()), text)
    with atomic_file(path, ResultsError) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def earlier(path: Path, machine: dict[str, Any]) -> dict[str, Row]:
    """Returns the rows that the file has already, which may be none. Raises ResultsError as `save`
    does."""
    if not path.is_file():
        return {}
    before = load(path)
    if before.machine != machine:
        raise ResultsError(f"{path} holds another machine's results; name another file")
    return before.rows


def rounded(value: Any) -> Any:
    """Numbers to six digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def load(path: Path) -> Results:
    """Reads a file that `save` or `pytest benchmarks/ --benchmark-json` wrote.

    Raises ResultsError for a file that is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path} cannot be read ({error.strerror}); llama-fast bench --json {path} writes it"
        ) from None
    except JSON_ERRORS as error:
        raise ResultsError(
            f"{path} cannot be read as results: {json_fault(error)}; measure again, into a new file"
        ) from None
    if isinstance(content, dict) and {"machine", "runs", "rows"} <= content.keys():
        runs, rows = content["runs"], {}
        for name, record in content["rows"].items():
            rows[name] = Row.from_record({**record, "measured_with": runs[record["run"]]})
        return Results(content["machine"], rows)
    if isinstance(content, dict) and {"machine_info", "llama_fast"} <= content.keys():
        return _from_pytest(content)
    raise ResultsError(
        f"{path} holds no results: give a file of llama-fast bench --json, of make bench-cpu, or "
        "of pytest benchmarks/ --benchmark-json"
    )


def _from_pytest(content: dict[str, Any]) -> Results:
    """A group of pytest-benchmark is a row, each of its benchmarks a baseline."""
    where = content["machine_info"]["llama_fast"]
    run = {**content["llama_fast"], "date": content["datetime"][:10]}
    rows: dict[str, Row] = {}
    for benchmark in content["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        if "row" not in info:
            continue
        row = rows.setdefault(
            benchmark["group"], Row.from_record({**info["row"], "measured_with": run})
        )
        who = info["baseline"]
        row.samples[who] = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
        for key, into in (
            ("error_against_float64", row.errors),
            ("host_seconds", row.host),
            ("peak_memory_bytes", row.memory),
        ):
            if info.get(key) is not None:
                into[who] = info[key]
    return Results(where, rows)
