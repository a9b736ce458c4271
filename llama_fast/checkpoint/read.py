"""Read a checkpoint of either format as a stream of our tensors.

Memory: the tensors themselves and, for a moment, MAPPED_BYTES (or an eighth of a layer of a very
large model) of the memory-mapped files, whose pages are let go as the copy advances.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.share import RowShare, Share
from ..errors import CheckpointError
from ..utils.files import given_path
from ..utils.hub import snapshot_hint
from ..utils.normal_tensors import normal_tensors
from .hf import is_hf, open_hf
from .meta import is_meta, open_meta
from .names import EMBED, HEAD, Weight, state_shapes, weights
from .others import refuse_other_weights
from .pieces import MAPPED_BYTES, Layout, Piece, equal_bits, row_blocks
from .quantized import QuantizedCheckpoint, is_quantized, open_quantized
from .share import part_of_layout
from .stored import Range, StoredFile

Format = Literal["hf", "meta"]
KINDS = (
    "the folder of a model: config.json with model.safetensors (Hugging Face), or params.json with "
    "consolidated.00.pth (Meta)"
)

# Called as progress(bytes done, bytes in all, name of the tensor) after each block.
Progress = Callable[[int, int, str], None]


def open_checkpoint(
    folder: str | Path, *, format: Format | None = None, rope_factor: float | None = None
) -> Checkpoint | QuantizedCheckpoint:
    """Open a folder in Meta's or Hugging Face's format, or of quantised weights, and check it,
    without loading it.

    `format` chooses where a folder holds both (the default is then Hugging Face's, with a
    warning). `rope_factor` overrides the RoPE scaling factor that params.json leaves out.

    Raises CheckpointError for a folder that is missing, incomplete or damaged, and ConfigError
    for a config that is no Llama 3's; everything but the values of the weights is checked here.
    """
    folder = given_path(folder, KINDS, CheckpointError)
    if format is None and rope_factor is None and is_quantized(folder):
        return open_quantized(folder)
    format = _choose_format(folder, format)
    if format == "hf" and rope_factor is not None:
        raise CheckpointError(
            f"{folder} is in Hugging Face's format, whose config.json gives the RoPE factor; "
            "change it there instead of giving rope_factor"
        )
    layout = open_hf(folder) if format == "hf" else open_meta(folder, rope_factor=rope_factor)
    return Checkpoint(folder, format, layout)


def _choose_format(folder: Path, wanted: Format | None) -> Format:
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give {KINDS}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give {KINDS}")
    if wanted is not None:
        if wanted not in ("hf", "meta"):
            raise CheckpointError(f"format is {wanted!r}; it must be 'hf' or 'meta'")
        return wanted
    if is_hf(folder):
        if is_meta(folder):
            warnings.warn(
                f"{folder} holds both formats; reading Hugging Face's (format='meta' reads the "
                "other)",
                stacklevel=3,
            )
        return "hf"
    if is_meta(folder):
        return "meta"
    refuse_other_weights(folder)
    # Half a checkpoint: let the format that it began say what is missing.
    names = {path.name for path in folder.iterdir()}
    if any(name.startswith("consolidated.") for name in names) or "params.json" in names:
        return "meta"
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "hf"
    if hint := snapshot_hint(folder):
        raise CheckpointError(f"{folder} holds no checkpoint: {hint}")
    inner = [path.parent for path in (*folder.glob("*/params.json"), *folder.glob("*/config.json"))]
    hint = f"; did you mean {inner[0]}?" if inner else ""
    raise CheckpointError(f"{folder} holds no checkpoint; give {KINDS}{hint}")


@dataclass
class Checkpoint:
    """A checked, not yet loaded checkpoint; see `open_checkpoint`.

    `config` is the model's; for Meta's format the weights have settled `tied` and removed copies
    of KV heads from `n_kv_heads`.
    """

    folder: Path
    format: Format
    _layout: Layout = field(repr=False)

    @property
    def config(self) -> LlamaConfig:
        return self._layout.config

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return [file.path for file in self._layout.files]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each of our tensors as it is stored (the widest, if its parts differ)."""
        result: dict[str, torch.dtype] = {}
        for ours, parts in self._by_name():
            stored = [piece.file.dtypes[piece.key] for _, pieces in parts for piece in pieces]
            result[ours] = reduce(torch.promote_types, stored)
        return result

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights are stored in."""
        count: Counter[torch.dtype] = Counter()
        shapes = state_shapes(self.config)
        for ours, dtype in self.dtypes.items():
            count[dtype] += math.prod(shapes[ours])
        return count.most_common(1)[0][0]

    def tensors(
        self,
        dtype: torch.dtype | None = None,
        *,
        check_finite: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (our name, tensor) in the model's order, each new memory on the CPU.

        One tensor at a time exists unless the caller keeps more. `dtype` None: as stored. A tied
        head is not yielded apart. Raises as `load_into` does.
        """
        dtypes, shapes = self.dtypes, state_shapes(self.config)
        copy = _Copy(self._layout, check_finite, progress)
        for ours, parts in self._by_name():
            with normal_tensors():
                tensor = torch.empty(shapes[ours], dtype=dtype or dtypes[ours], device="cpu")
            copy.fill(tensor, ours, parts)
            yield ours, tensor
            del tensor

    def rows(
        self, *, check_finite: bool = True, progress: Progress | None = None
    ) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Yield (our name, its rows) in the model's order: tensors of some rows, in their order and
        as stored, each new memory on the CPU. Take all rows of one before the next.

        What `tensors` yields at once, for whoever needs no weight as a whole: an embedding may be
        larger than all the rest of a small model. Raises as `load_into` does.
        """
        dtypes = self.dtypes
        copy = _Copy(self._layout, check_finite, progress)
        for ours, parts in self._by_name():
            yield ours, copy.rows(ours, parts, dtypes[ours])

    def load_into(
        self,
        state: Mapping[str, Tensor],
        *,
        check_finite: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Fill the tensors of a state dict, on any device, converting to the dtype of each.

        `state` has exactly the names and shapes of `state_shapes(self.config)`; a tied head may
        be there too, and is filled unless it is the embedding itself.

        Raises CheckpointError for a state that does not fit, for a weight that is not finite
        (`check_finite=False` skips that), for one that does not fit the dtype asked for, and
        where several files should hold the same and do not. The state is then partly filled.
        """
        self._check_state(state)
        copy = _Copy(self._layout, check_finite, progress)
        for ours, parts in self._by_name():
            copy.fill(state[ours], ours, parts)
        if self.config.tied and HEAD in state and state[HEAD].data_ptr() != state[EMBED].data_ptr():
            with torch.no_grad():
                state[HEAD].copy_(state[EMBED])

    def load_rows_into(
        self,
        state: Mapping[str, Tensor],
        share: RowShare,
        *,
        check_finite: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Fill tensors, on any device, each of which is the share's rows of one of the model, by
        their names in `state_shapes(self.config)`. No more is read than these and, where the share
        begins or ends, the rest of a block.

        Raises as `load_into` does, for weights of the share that are not finite.
        """
        shapes = state_shapes(self.config)
        copy = _Copy(self._layout, check_finite, progress)
        for ours, parts in self._by_name():
            run = share.of(shapes[ours][0])
            needed = (run[1] - run[0], *shapes[ours][1:])
            if tuple(state[ours].shape) != needed:
                raise CheckpointError(
                    f"rank {share.rank} of {share.ranks}: {ours} of the state to fill has shape "
                    f"{tuple(state[ours].shape)}; its rows of {self.folder} are {needed}"
                )
            copy.fill(state[ours], ours, parts, run)

    def part(self, share: Share) -> Checkpoint:
        """Returns what a rank has of the checkpoint: its config is the part's, and no more is read
        of the files."""
        return Checkpoint(self.folder, self.format, part_of_layout(self._layout, share))

    def _by_name(self) -> list[tuple[str, list[tuple[Weight, list[Piece]]]]]:
        pieces = self._layout.pieces
        return [
            (ours, [(weight, pieces[weight]) for weight in group])
            for ours, group in groupby(weights(self.config), key=lambda weight: weight.ours)
        ]

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = state_shapes(self.config)
        if self.config.tied and HEAD in state:
            shapes[HEAD] = shapes[EMBED]
        if shapes.keys() != state.keys():
            wrong = sorted(shapes.keys() ^ state.keys())
            raise CheckpointError(
                f"the state to fill does not have the names of {self.folder}: {wrong[0]} is only "
                f"in {'the checkpoint' if wrong[0] in shapes else 'the state'}"
            )
        for ours, shape in shapes.items():
            if tuple(state[ours].shape) != shape:
                raise CheckpointError(
                    f"{ours} of the state to fill has shape {tuple(state[ours].shape)}; "
                    f"{self.folder} has {shape}"
                )


class _Copy:
    """Copies pieces of files into our tensors, block by block, releasing the files on the way."""

    def __init__(self, layout: Layout, check_finite: bool, progress: Progress | None) -> None:
        self._files = layout.files
        self._check_finite = check_finite
        self._progress = progress
        self._head_dim = layout.config.head_dim
        sizes = {weight: _stored_bytes(pieces) for weight, pieces in layout.pieces.items()}
        self._total = sum(sizes.values())
        self._done = 0
        self._mapped = 0
        # Mapping a file again costs milliseconds, so a model of large layers does it less often.
        self._most_mapped = max(MAPPED_BYTES, self._total // layout.config.n_layers // 8)

    @torch.no_grad()
    def fill(
        self,
        target: Tensor,
        ours: str,
        parts: list[tuple[Weight, list[Piece]]],
        run: Range | None = None,
    ) -> None:
        """Fills one of our tensors; of a run of its rows (start, stop) the target is that run."""
        run = (0, len(target)) if run is None else run
        for weight, pieces in parts:
            for piece in pieces:
                row = weight.row
                if piece.dim == 0:
                    row, columns = row + piece.start, target
                else:
                    columns = target.narrow(piece.dim, piece.start, piece.length)
                for start, stop in self._blocks(piece):
                    self._fill_run(columns, run, row, piece, start, stop, ours)

    def _fill_run(
        self,
        target: Tensor,
        run: Range,
        row: int,
        piece: Piece,
        start: int,
        stop: int,
        ours: str,
    ) -> None:
        """What of the rows start:stop of a piece, the first of which is row `row` + start of our
        tensor, lies in the run becomes rows of the target, which is the run."""
        low, high = max(row + start, run[0]), min(row + stop, run[1])
        if low >= high:
            self._advance((stop - start) * _row_bytes(piece), 0, ours)
            return
        rows = target[low - run[0] : high - run[0]]
        if high - low == stop - start:
            self._fill_rows(rows, piece, start, stop, ours)
        else:  # a head whose rows are to be ordered anew may lie on the border
            block = torch.empty(stop - start, *rows.shape[1:], dtype=rows.dtype, device="cpu")
            self._fill_rows(block, piece, start, stop, ours)
            rows.copy_(block[low - row - start : high - row - start])

    def rows(
        self, ours: str, parts: list[tuple[Weight, list[Piece]]], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        for weight, pieces in parts:
            if len(pieces) == 1 or all(piece.dim == 0 for piece in pieces):
                for piece in pieces:
                    for start, stop in self._blocks(piece):
                        shape = (stop - start, *weight.shape[1:])
                        rows = torch.empty(shape, dtype=dtype, device="cpu")
                        self._fill_rows(rows, piece, start, stop, ours)
                        yield rows
            else:  # a row lies in several files
                whole = torch.empty(weight.shape, dtype=dtype, device="cpu")
                for piece in pieces:
                    self._fill_piece(
                        whole.narrow(piece.dim, piece.start, piece.length), piece, ours
                    )
                yield whole

    def _blocks(self, piece: Piece) -> Iterator[tuple[int, int]]:
        return row_blocks(piece.file, piece.key, self._head_dim if piece.permuted else 1)

    def _fill_piece(self, target: Tensor, piece: Piece, ours: str) -> None:
        for start, stop in self._blocks(piece):
            self._fill_rows(target[start:stop], piece, start, stop, ours)

    @torch.no_grad()
    def _fill_rows(self, rows: Tensor, piece: Piece, start: int, stop: int, ours: str) -> None:
        """`rows` becomes the rows start:stop of the piece."""
        block = piece.file.rows(piece.key, start, stop)
        for other in piece.copies:
            _refuse_other_copy(block, other.rows(piece.key, start, stop), piece, other)
        if piece.permuted:
            # Meta's order to Hugging Face's, as `meta_to_hf_rows`, straight into place.
            heads = (stop - start) // self._head_dim
            rows.unflatten(0, (heads, 2, -1)).copy_(
                block.unflatten(0, (heads, -1, 2)).transpose(1, 2)
            )
        else:
            rows.copy_(block)
        if self._check_finite:
            _refuse_non_finite(rows, block, piece)
        nbytes = block.nbytes
        del block  # so that the file can be let go
        self._advance(nbytes, 1 + len(piece.copies), ours)

    def _advance(self, nbytes: int, files: int, ours: str) -> None:
        self._done += nbytes
        self._mapped += nbytes * files
        if self._mapped >= self._most_mapped or self._done == self._total:
            for file in self._files:
                file.release()
            self._mapped = 0
        if self._progress is not None:
            self._progress(self._done, self._total, ours)


def _stored_bytes(pieces: list[Piece]) -> int:
    return sum(piece.file.nbytes(piece.key) for piece in pieces)


def _row_bytes(piece: Piece) -> int:
    return piece.file.nbytes(piece.key) // piece.file.shapes[piece.key][0]


def _refuse_other_copy(block: Tensor, copy: Tensor, piece: Piece, other: StoredFile) -> None:
    if copy.shape != block.shape or copy.dtype != block.dtype or not equal_bits(block, copy):
        raise CheckpointError(
            f"{piece.key} differs between {piece.file.path} and {other.path.name}, which must "
            "hold the same; the shards come from different models or one is damaged"
        )


def _refuse_non_finite(copied: Tensor, source: Tensor, piece: Piece) -> None:
    # A sum is not finite if any term is not, and is several times cheaper than looking at each;
    # the exact look follows only when the sum may just have overflowed.
    if torch.isfinite(copied.sum()) or torch.isfinite(copied).all():
        return
    if torch.isfinite(source).all():
        raise CheckpointError(
            f"{piece.file.path}: {piece.key} has values too large for "
            f"{str(copied.dtype).removeprefix('torch.')} (up to {source.abs().max().item():.3g}); "
            "load it as bfloat16 or float32"
        )
    raise CheckpointError(
        f"{piece.file.path}: {piece.key} has values that are not finite (NaN or infinity): the "
        "file is damaged, or the training that wrote it diverged"
    )
