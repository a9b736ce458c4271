"""Figures inside a page, which are taken from results files and never typed.

In a page, `<!-- decode bf16: × transformers -->2.1<!-- end -->` is the figure 2.1: the row of the
results by its name, and what is wanted of it. The comments do not show on the rendered page. Which
machine's results they are is said before them, once for all that follow:
`<!-- figures of intel-xeon-processor-avx512-vnni-2-threads -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import ResultsError
from ..results import Row

_MARKS = re.compile(
    r"<!-- figures of (?P<machine>\S+) -->|"
    r"(?P<begin><!-- (?P<row>[^:<>]+): (?P<wanted>[^<>]+) -->)[^<>]*(?P<end><!-- end -->)"
)


def filled(page: str, results: Mapping[str, Mapping[str, Row]]) -> str:
    """Returns the page with the figures of the results in their places.

    results  by the machine, as its results file is named, the rows by their names; figures of
             another machine stay as they are
    Raises ResultsError for a page without such a place, a row that the machine's results do not
    have, and a baseline that the row does not have.
    """
    machine, found = "", 0

    def place(match: re.Match) -> str:
        nonlocal machine, found
        if match["machine"]:
            machine = match["machine"]
            return match[0]
        found += 1
        rows = results.get(machine)
        if rows is None:
            return match[0]
        if match["row"] not in rows:
            raise ResultsError(
                f"{match['begin']}: the results of {machine} have no row {match['row']!r}; they "
                f"have {', '.join(sorted(rows))}"
            )
        return f"{match['begin']}{figure(rows[match['row']], match['wanted'])}{match['end']}"

    text = _MARKS.sub(place, page)
    if not found:
        raise ResultsError(
            "it has no place for a figure; write one as <!-- decode bf16: × transformers -->"
            "<!-- end -->, after <!-- figures of MACHINE -->, the name of a results file"
        )
    return text


def figure(row: Row, wanted: str) -> str:
    """Returns what is wanted of a row, in words.

    wanted  "ours": this package's median with its unit; "× NAME": how many times as fast ours is;
            "NAME": that baseline's median
    """
    medians, own = row.medians(), row.own()
    name = wanted.removeprefix("× ")
    if own is None or (name != "ours" and name not in medians):
        raise ResultsError(
            f"the row {row.name!r} has no {name!r}; it has ours, {', '.join(medians)}"
        )
    if wanted == "ours":
        return f"{medians[own]:.3g} {row.unit}"
    if wanted == name:
        return f"{medians[name]:.3g}"
    times = row.times(name, own)
    return f"{times:.1f}" if times < 10 else f"{times:.0f}"
