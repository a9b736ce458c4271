"""Documents become rows of at most T positions.

A document of L tokens has L-1 positions: each but its last token is read, and asks for the next. A
row holds pieces of documents one after the other, without padding; each piece sees itself only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch


def shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    """Returns the rows of an epoch, each once, in an order that depends on the arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator, device="cpu").tolist()


def best_fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Returns rows of whole items (their indices), none longer than `block` in sum: best fit
    decreasing, as the longest item left goes into the row where it leaves the least room.

    Items must not be longer than `block`; those of length 0 are left out.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(block + 1)]  # rows that have so much room
    rooms = 0  # bit r is set where by_room[r] holds a row
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    for item in order.tolist():
        length = lengths[item]
        if length <= 0:
            continue
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = block, len(rows)
            rows.append([])
        rows[row].append(item)
        left = room - length
        by_room[left].append(row)
        rooms |= 1 << left
    return rows


def cut(
    documents: Iterable[tuple[int, int, int]], block: int, stride: int | None = None
) -> list[list[tuple[int, int, int]]]:
    """Returns rows of pieces (source, start, end) of documents that may be cut anywhere.

    documents: (source, start, end) of the positions of each. Rows begin every `stride` positions
    (default `block`, so that each position is in one row) and are `block` long; the last one is
    what is left, if it has positions that no row before it has.
    """
    stride = stride or block
    given = [(source, a, b) for source, a, b in documents if b > a]
    borders = np.cumsum([0, *(b - a for _, a, b in given)])
    total = int(borders[-1])
    rows = []
    for start in range(0, total, stride):
        if start and start - stride + block >= total:
            break  # the row before ends with the last position
        stop = min(start + block, total)
        first = int(np.searchsorted(borders, start, side="right")) - 1
        row = []
        for n in range(first, len(given)):
            before = int(borders[n])
            if before >= stop:
                break
            source, a, b = given[n]
            row.append((source, a + max(start - before, 0), min(b, a + stop - before)))
        rows.append(row)
    return rows
