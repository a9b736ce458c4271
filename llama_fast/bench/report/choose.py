"""Which rows a figure shows, and what it calls them."""

from __future__ import annotations

from ..results import OURS, OWN, YARDSTICKS, Row

PARTS = ("decode", "prefill", "training")  # of what a model is asked for
NOISY = " ~"


def calls(rows: list[Row]) -> list[Row]:
    """Those of single ops that this package took part in, of several sizes of one call the largest
    alone: a sweep has a figure of its own."""
    largest: dict[tuple, Row] = {}
    for row in rows:
        if not row.call or row.own() is None or not row.bytes or row.call.get("warm"):
            continue
        key = tuple(row.call[k] for k in ("problem", "shape", "work", "dtype", "pass"))
        if key not in largest or size(row) > size(largest[key]):
            largest[key] = row
    return list(largest.values())


def size(row: Row) -> int:
    return row.call["batch"] * row.call["tokens"] * row.call["keys"]


def baselines(row: Row) -> list[str]:
    """Who is not of this package."""
    names = (name for name in row.samples if name not in (*OWN, *YARDSTICKS))
    return [name for name in names if not name.startswith(OURS)]


def without_rival(row: Row) -> bool:
    """Whether the baselines of a call are this package's own definition, eager and compiled: torch
    has no op for weights or a cache as they are quantised here."""
    return "quantized" in row.call["op"]


def sweeps(rows: list[Row]) -> list[list[Row]]:
    """Rows of attention that differ in their length, the shortest first; three at least. The batch
    is the same, or the number of all tokens is."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.call.get("op") == "attention" and row.own() and not row.call["warm"]:
            kind = tuple(row.call[k] for k in ("shape", "work", "dtype", "pass"))
            batch, tokens = row.call["batch"], row.call["batch"] * row.call["tokens"]
            found.setdefault((*kind, "sequences", batch), []).append(row)
            if row.call["tokens"] > 1:
                found.setdefault((*kind, "tokens", tokens), []).append(row)
    many = [sorted(group, key=size) for group in found.values() if len(group) >= 3]
    return sorted(many, key=lambda group: PARTS.index(group[0].call["work"]))


def mark(row: Row) -> str:
    return NOISY if row.noisy(row.own()) else ""


def said(baseline: str) -> str:
    """A baseline as a reader knows it."""
    return f"{OURS} ({baseline})" if baseline in OWN and baseline != OURS else baseline


def labels(rows: list[Row]) -> dict[str, str]:
    """By the row's name what tells it from the others of its part; a mark where ours is too noisy.
    The model's size is said where there are several."""
    several = len({row.call["shape"] for row in rows}) > 1
    return {row.name: _label(row, several) for row in rows}


def _label(row: Row, with_shape: bool) -> str:
    call = row.call
    words = [call["problem"], *([call["shape"]] if with_shape else [])]
    if call["work"] == "training":
        words.append("" if call["pass"] == "backward" else f"({call['pass']})")
    return " ".join(filter(None, words)) + mark(row)
