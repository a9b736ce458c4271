"""How the commands write quantities, and results to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def duration(seconds: float) -> str:
    """Returns three digits or more, in s, ms, µs or ns."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:,.2f} {unit}"
    if abs(seconds) * 1e6 >= 1:
        return f"{seconds * 1e6:,.1f} µs"
    return f"{seconds * 1e9:.0f} ns"


def count(value: float) -> str:
    """Returns for example 1.24 G: decimal prefixes, three digits."""
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def rate(per_second: float) -> str:
    """Returns a rate in thousand millions a second."""
    return f"{per_second / 1e9:,.1f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the content as JSON; the file appears whole, or not at all."""
    from ..utils.files import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
