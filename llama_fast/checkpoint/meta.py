"""Open a Meta folder: params.json and consolidated.00.pth, 01, …, each with a cut of every matrix.

Legend of dims: K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config import LlamaConfig
from ..errors import CheckpointError, ConfigError
from .names import EMBED, Weight, weights
from .others import refuse_other_weights
from .pieces import (
    Layout,
    Piece,
    refuse_few_tensors,
    refuse_wrong_dtypes,
    refuse_wrong_keys,
    same_matrix,
)
from .stored import PthFile, StoredFile, open_files, read_json

PARAMS, PATTERN = "params.json", "consolidated.*.pth"
_EMBED_KEY, _HEAD_KEY = "tok_embeddings.weight", "output.weight"


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() and any(folder.glob(PATTERN))


def open_meta(folder: Path, *, rope_factor: float | None = None) -> Layout:
    """Find and check every matrix of the folder.

    Reads the files' directories, and of the weights only what settles two questions that
    params.json leaves open: whether the head is the embedding, and whether KV heads are stored
    twice. Raises as `llama_fast.checkpoint.hf.open_hf` does.
    """
    params_file = folder / PARAMS
    if not params_file.is_file():
        raise CheckpointError(f"{params_file} is missing; copy it from where the weights came from")
    try:
        config = LlamaConfig.from_meta(read_json(params_file), rope_factor=rope_factor)
    except ConfigError as error:
        raise ConfigError(f"{params_file}: {error}") from None
    files = open_files(PthFile, _weight_files(folder))

    first = files[0]
    tied = _HEAD_KEY not in first.shapes or (
        _EMBED_KEY in first.shapes and all(_same_head(file) for file in files)
    )
    config = _without_kv_copies(replace(config, tied=tied), files)
    layout = Layout(config, params_file, files)
    refuse_few_tensors(config, params_file, max(len(file.shapes) for file in files))
    wanted = {weight.meta for weight in weights(config)}
    for file in files:
        keys = set(file.shapes)
        if tied and _HEAD_KEY in first.shapes:
            keys.discard(_HEAD_KEY)
        refuse_wrong_keys(layout, keys, wanted, file.path)
    for weight in weights(config):
        layout.pieces[weight] = _pieces(weight, files, config)
    refuse_wrong_dtypes(layout)
    return layout


def _weight_files(folder: Path) -> list[Path]:
    """consolidated.00.pth … in order; raises where the numbering has a hole."""
    present = sorted(folder.glob(PATTERN))
    if not present:
        refuse_other_weights(folder)
        raise CheckpointError(
            f"{folder} has no consolidated.00.pth; copy or download the weights beside {PARAMS}"
        )
    expected = [folder / f"consolidated.{i:02d}.pth" for i in range(len(present))]
    missing = sorted(set(expected) - set(present))
    if missing:
        extra = sorted(set(present) - set(expected))
        raise CheckpointError(
            f"{missing[0]} is missing, while {extra[0].name} is there; the files must be numbered "
            "from 00 without a hole"
        )
    return expected


def _same_head(file: StoredFile) -> bool:
    return {_EMBED_KEY, _HEAD_KEY} <= set(file.shapes) and same_matrix(
        (file, _EMBED_KEY), (file, _HEAD_KEY)
    )


def _without_kv_copies(config: LlamaConfig, files: list[StoredFile]) -> LlamaConfig:
    """Lower n_kv_heads to the distinct ones, where each file holds one head and some are copies.

    A model cut into more files than it has KV heads repeats them, and counts the copies in
    n_kv_heads (405B in 16 files). Judged by layer 0 here; every layer is compared when it is read.
    """
    keys = ["layers.0.attention.wk.weight", "layers.0.attention.wv.weight"]
    one_head = (config.head_dim, config.dim)
    if len(files) != config.n_kv_heads or len(files) == 1:
        return config
    if any(file.shapes.get(key) != one_head for file in files for key in keys):
        return config
    copies = 1
    while copies < len(files) and all(
        same_matrix((files[0], key), (files[copies], key)) for key in keys
    ):
        copies += 1
    if len(files) % copies or not all(
        same_matrix((files[i - i % copies], key), (files[i], key))
        for i in range(len(files))
        for key in keys
        if i % copies
    ):
        return config
    return replace(config, n_kv_heads=config.n_kv_heads // copies)


def _pieces(weight: Weight, files: list[StoredFile], config: LlamaConfig) -> list[Piece]:
    key = weight.meta
    if weight.cut is None:
        for file in files:
            if file.shapes[key] != weight.shape:
                raise _wrong_shape(weight, file)
        return [Piece(files[0], key, 0, 0, weight.shape[0], copies=tuple(files[1:]))]

    dim = weight.cut
    if weight.ours == EMBED and files[0].shapes[key][:1] == weight.shape[:1]:
        dim = 1  # Llama 1 and 2 cut the embedding along its columns
    for file in files:
        shape = file.shapes[key]
        if len(shape) != 2 or shape[1 - dim] != weight.shape[1 - dim]:
            raise _wrong_shape(weight, file)
    lengths = [file.shapes[key][dim] for file in files]
    total, needed = sum(lengths), weight.shape[dim]
    copies = 1
    if weight.letters[0] == "K·D" and total % needed == 0 and set(lengths) == {config.head_dim}:
        copies = total // needed
    if total // copies != needed or (weight.heads and any(n % config.head_dim for n in lengths)):
        raise _wrong_total(weight, files, dim, total)

    pieces: list[Piece] = []
    start = 0
    for i in range(0, len(files), copies):
        same = tuple(files[i + 1 : i + copies])
        pieces.append(Piece(files[i], key, dim, start, lengths[i], weight.heads > 0, same))
        start += lengths[i]
    return pieces


def _wrong_shape(weight: Weight, file: StoredFile) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: {weight.meta} has shape {file.shapes[weight.meta]}, but {PARAMS} needs "
        f"{weight.needs('meta')}"
        + ("" if weight.cut is None else f" (dim {weight.cut} may be cut over several files)")
        + "; one of the two belongs to another model"
    )


def _wrong_total(weight: Weight, files: list[StoredFile], dim: int, total: int) -> CheckpointError:
    """The cuts of a matrix do not add up: a file too few or too many, or a wrong params.json."""
    each = files[0].shapes[weight.meta][dim]
    text = (
        f"{files[0].path.parent}: {weight.meta} adds up to {total} along dim {dim} over "
        f"{len(files)} file(s) of {each}, but {PARAMS} needs {weight.needs('meta')}"
    )
    needed = weight.shape[dim]
    if each and needed % each == 0:
        count = needed // each
        which = "a shard is missing" if count > len(files) else "there is an extra shard"
        text += f", which is {count} file(s): {which}, or {PARAMS} belongs to another model"
    else:
        text += f"; {PARAMS} or the files belong to another model"
    return CheckpointError(text)
