"""A rank's part of a checkpoint: the same files, of which it reads its rows and columns alone.

A file is wrapped so that each matrix in it seems to be the part; what reads checkpoints then reads
parts as it reads wholes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config.quantization import ROWS, Quantization, WeightFormat
from ..config.share import Share
from ..errors import ConfigError
from .names import Weight, state_shapes, weights
from .pieces import Layout, Piece
from .stored import Range, StoredFile


@dataclass(frozen=True)
class Window:
    """What of a stored matrix is read: runs of rows, one behind another, and columns."""

    rows: tuple[Range, ...]
    columns: Range | None = None

    def runs(self, start: int, stop: int) -> Iterator[Range]:
        """The stored rows that are the window's rows start:stop."""
        for first, last in self.rows:
            low, high = first + start, min(first + stop, last)
            if low < high:
                yield low, high
            start, stop = max(0, start - (last - first)), stop - (last - first)
            if stop <= 0:
                return


class PartOfFile(StoredFile):
    """A file whose matrices seem to be what their windows show; those without one are whole."""

    def __init__(self, file: StoredFile) -> None:
        self.path, self.dtypes = file.path, file.dtypes
        self.shapes = dict(file.shapes)
        self._file = file
        self._windows: dict[str, Window] = {}

    def show(self, key: str, window: Window) -> None:
        count = sum(stop - start for start, stop in window.rows)
        columns = self._file.shapes[key][1:2]
        if window.columns is not None:
            columns = (window.columns[1] - window.columns[0],)
        self.shapes[key] = (count, *columns, *self._file.shapes[key][2:])
        self._windows[key] = window

    def rows(self, key: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        window = self._windows.get(key)
        if window is None:
            return self._file.rows(key, start, stop, columns)
        runs = window.runs(start, stop)
        parts = [self._file.rows(key, first, last, window.columns) for first, last in runs]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found if columns is None else found[:, slice(*columns)]

    def release(self) -> None:
        self._file.release()


def part_of_layout(layout: Layout, share: Share) -> Layout:
    """The layout of the rank's part."""
    files = {id(file): PartOfFile(file) for file in layout.files}
    part = Layout(share.part, layout.config_file, list(files.values()))
    of_part = {(weight.ours, weight.hf): weight for weight in weights(share.part)}
    for weight in weights(layout.config):
        pieces = layout.pieces[weight]
        if weight.cut is None:
            found = [_whole(piece, files) for piece in pieces]
        else:
            run = share.ranges[weight.letters[weight.cut]]
            found = [cut for piece in pieces if (cut := _cut(piece, weight, run, files))]
        part.pieces[of_part[weight.ours, weight.hf]] = found
    return part


def _whole(piece: Piece, files: dict[int, PartOfFile]) -> Piece:
    copies = tuple(files[id(file)] for file in piece.copies)
    return replace(piece, file=files[id(piece.file)], copies=copies)


def _cut(piece: Piece, weight: Weight, run: Range, files: dict[int, PartOfFile]) -> Piece | None:
    """What of a piece lies in the run along the dim in which the weight is cut. Copies of it are
    left alone: each rank reads its own part."""
    file = files[id(piece.file)]
    start, length = piece.start, piece.length
    low, high = run
    if piece.dim == weight.cut:
        low, high = max(run[0], start), min(run[1], start + length)
        if low >= high:
            return None
        of_file = low - start, high - start
        start, length = low - run[0], high - low
    else:  # the file has all of the dim that is cut
        of_file = run
    if weight.cut == 0:
        window = Window((of_file,))
    else:
        window = Window(((0, piece.file.shapes[piece.key][0]),), of_file)
    file.show(piece.key, window)
    return replace(piece, file=file, start=start, length=length, copies=())


def part_of_quantized(file: StoredFile, quantization: Quantization, share: Share) -> PartOfFile:
    """The file of a quantised folder, of which the rank's part is seen. Raises ConfigError where a
    part would begin inside of a block of rows or of a group of columns."""
    part = PartOfFile(file)
    for name, (dim, runs) in _runs(share).items():
        form = quantization.of_weight(name)
        if form is None:
            part.show(name, _window(dim, runs, file.shapes[name][0]))
            continue
        whole = state_shapes(share.whole)[name][dim]
        _refuse_odd(name, form, dim, runs, whole, share)
        for buffer in form.buffers((0, 0)):
            key = f"{name}.{buffer}"
            unit = ROWS if dim == 0 else form.group_size
            if dim == 1 and buffer == "qdata":
                unit = 32 // form.bits  # columns of which the four bytes lie together
            packed = [(start // unit, -(-stop // unit)) for start, stop in runs]
            if dim == 1 and runs[-1][1] == whole:  # the last group is filled up
                packed = [(packed[0][0], file.shapes[key][1])]
            part.show(key, _window(dim, packed, file.shapes[key][0]))
    return part


def _runs(share: Share) -> dict[str, tuple[int, list[Range]]]:
    """Of each of our tensors that is cut: the dim, and the rank's runs along it."""
    found: dict[str, tuple[int, list[Range]]] = {}
    for weight in weights(share.whole):
        if weight.cut is not None:
            start, stop = share.ranges[weight.letters[weight.cut]]
            first = weight.row if weight.cut == 0 else 0
            runs = found.setdefault(weight.ours, (weight.cut, []))[1]
            runs.append((first + start, first + stop))
    return found


def _window(dim: int, runs: list[Range], rows: int) -> Window:
    if dim == 0:
        return Window(tuple(runs))
    return Window(((0, rows),), runs[0])


def _refuse_odd(
    name: str, form: WeightFormat, dim: int, runs: list[Range], whole: int, share: Share
) -> None:
    unit = ROWS if dim == 0 else form.group_size
    ends = [end for run in runs for end in run if end != whole]
    if any(end % unit for end in ends):
        what = "blocks of rows" if dim == 0 else "groups of columns"
        raise ConfigError(
            f"{name} is stored in {what} of {unit}, which {share.ranks} ranks would have to cut: "
            "start fewer ranks, or give the folder that it was made from and quantize"
        )
