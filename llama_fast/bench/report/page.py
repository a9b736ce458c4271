"""A report: one page of Markdown with its tables and figures, and figures in other pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ResultsError
from ...utils.files import atomic_file, make_folder
from ..machine import file_name
from ..results import OURS, Goal, Results, Row
from .choose import NOISY
from .figures import FIGURES, peaks_of
from .marks import filled

UNITS = {"read": "GB/s", "copy": "GB/s", "float32": "GFLOP/s", "bfloat16": "GFLOP/s"}


class Written(NamedTuple):
    """The page, and the figures beside it."""

    page: Path
    figures: list[Path]


def write(results: list[Results], folder: Path, *, figures: bool = True) -> Written:
    """Writes `report.md` and PNGs into a folder, which is made where it is missing.

    results  as `llama_fast.bench.results.load` reads them; those of one machine become one part

    Raises ResultsError where there is no row, LlamaFastError where figures need matplotlib and it
    is not installed.
    """
    machines = _by_machine(results)
    if not any(rows for _, rows in machines):
        raise ResultsError("the results have no rows: nothing was measured")
    make_folder(folder)
    made: list[Path] = []
    parts = []
    for where, rows in machines:
        about = _about(where, rows)
        drawn = _draw(where, rows, about, folder) if figures else {}
        made += drawn.values()
        links = [f"![{said}]({path.name})" for said, path in drawn.items()]
        tables = filter(
            None,
            (_peaks(rows), targets(rows), _calls(rows), _checks(rows), _versions(rows)),
        )
        parts.append("\n\n".join([f"## {about}", *links, *tables]))
    page = folder / "report.md"
    head = f"# Measured\n\n{HOW}"
    with atomic_file(page) as partial:
        partial.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")
    return Written(page, made)


def fill(page: Path, results: list[Results]) -> None:
    """Puts figures of the results into their places in a page, as `marks` says them. Raises
    ResultsError for a page that has none, or asks for what the results do not have."""
    machines = {_stem(where, rows): rows for where, rows in _by_machine(results)}
    by_name = {stem: {row.name: row for row in rows} for stem, rows in machines.items()}
    try:
        text = filled(page.read_text(encoding="utf-8"), by_name)
    except OSError as error:
        raise ResultsError(f"{page} cannot be read: {error.strerror}") from None
    except ResultsError as error:
        raise ResultsError(f"{page}: {error}") from None
    with atomic_file(page) as partial:
        partial.write_text(text, encoding="utf-8")


HOW = f"""Medians of interleaved rounds, with the spread between their quartiles. Rows
marked with{NOISY} are too noisy to count: their samples spread over a tenth of the median, or other
programs kept the processors busy. Made by `llama-fast report`."""


def _by_machine(results: list[Results]) -> list[tuple[dict[str, Any], list[Row]]]:
    """(machine, rows), the rows of a later file in place of those of the same name."""
    found: list[tuple[dict[str, Any], dict[str, Row]]] = []
    for one in results:
        rows = next((rows for where, rows in found if where == one.machine), None)
        if rows is None:
            found.append((one.machine, dict(one.rows)))
        else:
            rows.update(one.rows)
    return [(where, list(rows.values())) for where, rows in found]


def _device(rows: list[Row]) -> tuple[str, int]:
    """(device, threads) of the last run that says so."""
    runs = [row.measured_with for row in rows if row.measured_with.get("roofline")]
    run = runs[-1] if runs else {}
    return run.get("roofline", {}).get("device", "cpu"), run.get("threads", 1)


def _stem(where: dict[str, Any], rows: list[Row]) -> str:
    """The machine, for names of files."""
    device, threads = _device(rows)
    return file_name(where, threads, device)


def _about(where: dict[str, Any], rows: list[Row]) -> str:
    device, threads = _device(rows)
    dates = sorted({row.measured_with["date"] for row in rows if "date" in row.measured_with})
    when = dates[0] if dates[:1] == dates[-1:] else f"{dates[0]} to {dates[-1]}"
    if device != "cpu":
        return f"{where['gpus'][int(device.partition(':')[2] or 0)]}, {when}"
    counts = sorted({row.measured_with.get("threads", threads) for row in rows})
    kind = file_name(where, threads).removesuffix(f"-{threads}-threads").rpartition("-")[2]
    isa = where["isa"] or "no C++ kernels"
    isa += f" with {kind.upper()}" if kind not in (isa, "") and where["isa"] else ""
    many = " or ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")
    return f"{where['cpu']}, {isa}, {many}, {when}"


def _draw(where: dict[str, Any], rows: list[Row], about: str, folder: Path) -> dict[str, Path]:
    stem, found = _stem(where, rows), {}
    for kind, (draw, said) in FIGURES.items():
        figure = draw(rows, f"{said}{_sizes(rows)}\n{about}")
        if figure is None:
            continue
        path = folder / f"{stem}-{kind}.png"
        with atomic_file(path) as partial:
            # No name of a version in it, so the same results make the same file.
            figure.savefig(partial, format="png", metadata={"Software": None})
        found[said] = path
    return found


def _sizes(rows: list[Row]) -> str:
    """Of the models whose calls were measured."""
    shapes = dict.fromkeys(row.call["shape"] for row in rows if row.call)
    return f", at the sizes of Llama {', '.join(shapes)}" if shapes else ""


def _peaks(rows: list[Row]) -> str:
    found = peaks_of(rows)
    if not found:
        return ""
    said = (
        f"{name} {found[name] / 1e9:.3g} {unit}" for name, unit in UNITS.items() if name in found
    )
    return "Peak rates, measured: " + ", ".join(said) + "."


def targets(rows: list[Row]) -> str:
    """The rows that have goals which were measured; a goal that was missed says so."""
    rows = [row for row in rows if any(goal.value is not None for goal in row.goals)]
    if not rows:
        return ""
    return "\n".join(["| work | llama_fast | beside | goals |", "|---|---|---|---|",
                      *map(_target, rows)])  # fmt: skip


def _target(row: Row) -> str:
    medians, own = row.medians(), row.own()
    others = [name for name in medians if name != own]
    if own is None:  # the baselines are our own ops
        own, others = max(medians, key=medians.__getitem__), []
    ours = f"{medians[own]:.3g} {row.unit}{_held(row, own)}"
    ours += f" ({own})" if own != OURS else ""
    beside = ", ".join(f"{name} {medians[name]:.3g}{_held(row, name)}" for name in others)
    goals = ", ".join(
        f"{goal.value:.2f} {goal.what} ({_verdict(goal)})"
        for goal in row.goals
        if goal.value is not None
    )
    noisy = " — too noisy to count" if row.too_noisy else ""
    return f"| {row.what} | {ours} | {beside} | {goals}{noisy} |"


def _held(row: Row, baseline: str) -> str:
    """A model's memory; that of a single call is in a table of its own."""
    if row.call or baseline not in row.memory:
        return ""
    return f", {row.memory[baseline] / 1e9:.2g} GB"


def _verdict(goal: Goal) -> str:
    needed = f"{'≤' if goal.at_most else '≥'} {goal.needed:g}"
    return f"goal {needed}" if goal.holds else f"goal {needed}: missed"


def _calls(rows: list[Row]) -> str:
    """A line for each baseline of each call of an op."""
    columns = ("call", "baseline", "time", "spread", "GB/s", "GFLOP/s", "of peak", "× eager",
               "host", "memory", "error")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * 9]
    for row in rows:
        for name in row.samples if row.call and row.bytes else ():
            lines.append(_call(row, name))
    return "\n".join(lines) if len(lines) > 2 else ""


def _call(row: Row, name: str) -> str:
    cells = [
        row.name + (NOISY if row.too_noisy else ""),
        name,
        *row.figures(name),
        f"{row.host[name] * 1e6:.1f} µs" if name in row.host else "",
        f"{row.memory[name] / 1e6:,.1f} MB" if name in row.memory else "",
        f"{row.errors[name]:.1e}" if name in row.errors else "",
    ]
    return f"| {' | '.join(cells)} |"


def _checks(rows: list[Row]) -> str:
    """Results in words: rows that no baseline took part in."""
    return "\n".join(f"- {row.what}: {'; '.join(row.notes)}" for row in rows
                     if row.notes and not row.samples)  # fmt: skip


def _versions(rows: list[Row]) -> str:
    """Of what took part, where it was installed."""
    found: dict[str, str] = {}
    for row in rows:
        for name, version in (row.measured_with.get("versions") or {}).items():
            if isinstance(version, dict):
                version = version.get("version")
            if version is not None:
                found[name] = str(version)
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."
