"""The README's table of measured figures, made from the results files.

    python -m benchmarks.table [RESULTS.json ...]            # prints Markdown
    python -m benchmarks.table --write README.md README.zh-CN.md

With --write the text between the two marks in each file is replaced. A row is shown when its goals
were measured; a goal that was missed says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import OURS, load
from llama_fast.atomic import atomic_file

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- begin benchmarks.table -->", "<!-- end benchmarks.table -->"


def markdown(results: list[dict[str, Any]]) -> str:
    return "\n\n".join(_machine_table(found) for found in results)


def _machine_table(found: dict[str, Any]) -> str:
    machine, rows = found["machine"], found["rows"].values()
    threads = sorted({row["measured_with"]["threads"] for row in rows})
    dates = sorted({row["measured_with"]["date"] for row in rows})
    head = f"{machine['cpu']}, {machine['isa']}, {' or '.join(map(str, threads))} threads, "
    head += dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [head, "", "| work | llama_fast | beside | goals |", "|---|---|---|---|"]
    lines += [_line(row) for row in rows if any(g["value"] is not None for g in row["goals"])]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    unit, medians = row["unit"], row["medians"]
    if OURS in medians:
        ours = f"{medians[OURS]:.3g} {unit}"
        others = {name: value for name, value in medians.items() if name != OURS}
    else:  # the contenders are our own ops
        dearest = max(medians, key=medians.__getitem__)
        ours, others = f"{medians[dearest]:.3g} {unit} ({dearest})", {}
    beside = ", ".join(f"{name} {value:.3g}" for name, value in others.items())
    goals = ", ".join(
        f"{goal['value']:.2f} {goal['what']} ({_verdict(goal)})"
        for goal in row["goals"]
        if goal["value"] is not None
    )
    noisy = " — too noisy to count" if row["too_noisy"] else ""
    return f"| {row['what']} | {ours} | {beside} | {goals}{noisy} |"


def _verdict(goal: dict[str, Any]) -> str:
    needed = f"{'≤' if goal['at_most'] else '≥'} {goal['needed']:g}"
    return f"goal {needed}" if goal["holds"] else f"goal {needed}: missed"


def replace_between_marks(path: Path, text: str) -> None:
    """Raises ValueError when the file has not exactly one pair of marks."""
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path} must have one line {BEGIN} and, after it, one line {END}")
    before, rest = content.split(BEGIN)
    with atomic_file(path) as partial:
        partial.write_text(
            f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
    parser.add_argument("results", nargs="*", type=Path, help="else all of benchmarks/results/")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", default=[])
    given = parser.parse_args(arguments)
    paths = given.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        parser.error("there are no results yet: run make bench-cpu")
    text = markdown([load(path) for path in paths])
    if not given.write:
        print(text)
    for path in given.write:
        replace_between_marks(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
