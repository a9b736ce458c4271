"""Comparing sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_beginning(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns how many of the first elements are equal."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
