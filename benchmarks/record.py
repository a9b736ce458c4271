"""What a measurement leaves behind: rows with every sample, their goals, and the results file.

A row holds what it was measured with (versions, ceilings, threads, date), so a run of some rows
may update those rows of a file and keep the others.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_fast import machine
from llama_fast.atomic import atomic_file
from llama_fast.timing import TOO_BUSY, TOO_NOISY, spread

OURS = "llama_fast"
PEERS = ("transformers", "llama-cpp-python", "gguf", "numpy")


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
    """One line of the table of targets.

    unit     of the rates: work per second, such as tokens; or of the samples where work is None
    work     what one sample does, the same for all contenders
    samples  of each contender: seconds, or already in `unit`
    others   part of the processors' time that other programs took meanwhile; None: not known
    missing  who could not take part, and why
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
    measured_with: dict[str, Any] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """Of each contender, in `unit`."""
        found = {name: statistics.median(samples) for name, samples in self.samples.items()}
        return found if self.work is None else {n: self.work / x for n, x in found.items()}

    def spreads(self) -> dict[str, float]:
        return {name: spread(samples) for name, samples in self.samples.items()}

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
        goals = [{**asdict(goal), "text": str(goal), "holds": goal.holds} for goal in self.goals]
        return {
            **asdict(self),
            "goals": goals,
            "medians": self.medians(),
            "spreads": self.spreads(),
            "too_noisy": self.too_noisy,
        }


def versions(llama_cpp: dict[str, str] | None) -> dict[str, Any]:
    """Of everything that took part; `llama_cpp` is what that library says of itself."""
    return {**machine.versions(*PEERS), "commit": _commit(), "llama.cpp": llama_cpp}


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.decode().strip() + (" with changes" if changed.stdout else "")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def save(path: Path, found: dict[str, Any], rows: list[Row]) -> None:
    """Writes the results file; rows of an earlier run of other names stay.

    Raises ValueError when the file is of another machine.
    """
    kept = {}
    if path.exists():
        before = load(path)
        if before["machine"] != found:
            raise ValueError(f"{path} holds another machine's results; give another --json")
        kept = before["rows"]
    rows_by_name = kept | {row.name: row.record() for row in rows}
    content = _rounded({"machine": found, "rows": rows_by_name})
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # A list of numbers or words is one line.
    text = re.sub(r"\[[^][{}]+\]", lambda match: " ".join(match[0].split()), text)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Numbers to six digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
