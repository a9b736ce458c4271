"""Rows with their goals, as a table on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from llama_fast.bench.results import Goal, Row


def show(console: Console, row: Row) -> None:
    console.print(table_of([row]))
    for absent, why in row.missing.items():
        console.print(f"  {absent} did not take part: {why}", markup=False)
    for why in row.too_noisy:
        console.print(f"  too noisy: {why}")


def table_of(rows: list[Row]) -> Table:
    table = Table("row", "baseline", "median", "spread", "goal", "measured", box=box.SIMPLE_HEAD)
    for row in rows:
        medians, spreads = row.medians(), row.spreads()
        left = [
            (name, f"{median:.4g} {row.unit}", f"{spreads[name]:.0%}")
            for name, median in medians.items()
        ]
        right = [(str(goal), _measured(goal)) for goal in row.goals]
        for index in range(max(len(left), len(right), 1)):
            first = row.name if index == 0 else ""
            cells = left[index] if index < len(left) else ("", "", "")
            table.add_row(first, *cells, *(right[index] if index < len(right) else ("", "")))
        table.add_section()
    return table


def _measured(goal: Goal) -> str:
    if goal.value is None:
        return "not measured"
    return f"{goal.value:.3g} {'holds' if goal.holds else 'missed'}"
