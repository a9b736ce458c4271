"""Text for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def aligned(
    rows: Sequence[Sequence[str]], rest: Callable[[str, int], str] = str.ljust
) -> list[str]:
    """Returns the rows as lines, the first column to the left and the others as `rest` has them:
    str.ljust, or str.rjust for numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(rest, others, widths[1:])]).rstrip()
        for first, *others in rows
    ]
