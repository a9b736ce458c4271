"""Where each published matrix lies in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..errors import CheckpointError
from .names import IGNORED, Weight
from .stored import StoredFile

BLOCK_BYTES = 4 * 2**20  # read at a time
MAPPED_BYTES = 16 * 2**20  # read before mapped files are released


@dataclass(frozen=True)
class Piece:
    """What one file holds of a matrix: `length` along `dim`, from `start` on."""

    file: StoredFile
    key: str
    dim: int
    start: int
    length: int
    permuted: bool = False  # rows in Meta's rotary order
    copies: tuple[StoredFile, ...] = ()  # files that must hold the very same under this key


@dataclass
class Layout:
    """An opened checkpoint folder: its config, its files and the pieces of every matrix."""

    config: LlamaConfig
    config_file: Path
    files: list[StoredFile]
    pieces: dict[Weight, list[Piece]] = field(default_factory=dict)


def row_blocks(file: StoredFile, key: str, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of about BLOCK_BYTES, each a multiple of `multiple` rows."""
    rows = file.shapes[key][0]
    row_bytes = max(1, file.nbytes(key) // rows)
    step = max(1, BLOCK_BYTES // (row_bytes * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits (a NaN equals itself)."""
    integer = {2: torch.int16, 4: torch.int32}.get(left.dtype.itemsize, torch.uint8)
    return torch.equal(left.view(integer), right.view(integer))


def same_matrix(left: tuple[StoredFile, str], right: tuple[StoredFile, str]) -> bool:
    """Whether two stored matrices are equal, found without holding either in memory."""
    (file, key), (other, other_key) = left, right
    if (file.shapes[key], file.dtypes[key]) != (other.shapes[other_key], other.dtypes[other_key]):
        return False
    mapped = 0
    for start, stop in row_blocks(file, key):
        a, b = file.rows(key, start, stop), other.rows(other_key, start, stop)
        if a.data_ptr() != b.data_ptr() and not equal_bits(a, b):
            return False
        mapped += 2 * a.nbytes
        if mapped > MAPPED_BYTES:
            file.release()
            other.release()
            mapped = 0
    file.release()
    other.release()
    return True


def refuse_few_tensors(config: LlamaConfig, config_file: Path, count: int) -> None:
    """Raises CheckpointError where there are fewer tensors than layers, before the names of all
    weights are listed: of 300,000 layers that would take a minute."""
    if config.n_layers > count:
        raise CheckpointError(
            f"{config_file} has {layers_of(config, config_file)}, and its weights are {count} "
            "tensors; one of the two belongs to another model"
        )


def layers_of(config: LlamaConfig, config_file: Path) -> str:
    """Returns the number of layers by the name that it has in the file."""
    key = "num_hidden_layers" if config_file.name == "config.json" else "n_layers"
    return f"{key}={config.n_layers}"


def refuse_wrong_keys(layout: Layout, found: Iterable[str], wanted: set[str], where: Path) -> None:
    """Raise CheckpointError for keys that the model does not have and for those that are missing.

    The RoPE tables that some writers saved are tolerated.
    """
    found = set(found)
    unknown = sorted(key for key in found - wanted if not IGNORED.fullmatch(key))
    missing = sorted(wanted - found)
    config = f"{layout.config_file.name} ({layers_of(layout.config, layout.config_file)})"
    if missing:
        raise CheckpointError(
            f"{where}: {_some(missing)} {'is' if len(missing) == 1 else 'are'} missing, which "
            f"{config} needs" + (f"; it has unknown {_some(unknown)}" if unknown else "")
        )
    if unknown:
        raise CheckpointError(
            f"{where}: unknown {_some(unknown)}; a Llama 3 text model as in {config} has no such "
            "weights"
        )


def refuse_wrong_dtypes(layout: Layout) -> None:
    """Raise CheckpointError where a matrix is stored as anything but float32, float16, bfloat16."""
    for pieces in layout.pieces.values():
        for piece in pieces:
            dtype = piece.file.dtypes[piece.key]
            if isinstance(dtype, str):
                raise CheckpointError(
                    f"{piece.file.path}: {piece.key} is stored as {dtype}; weights must be "
                    "float32, float16 or bfloat16 (llama_fast quantises them itself)"
                )


def _some(names: list[str], most: int = 3) -> str:
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
