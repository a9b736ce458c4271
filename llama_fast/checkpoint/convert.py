"""Convert a checkpoint between the two formats without ever holding it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..tokenizer.special_tokens import TOKENIZER_CONFIG
from ..utils.files import refuse_existing
from .hf import CONFIG
from .names import state_shapes
from .quantized import QuantizedCheckpoint
from .read import Checkpoint, Format, Progress, open_checkpoint
from .special_tokens import special_token_ids, tokenizer_config
from .stored import read_json
from .write import GENERATION_CONFIG, MAX_SHARD_BYTES, stream_hf, stream_meta

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_HF_TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SPECIAL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert(
    source: str | Path,
    target: str | Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    n_files: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    rope_factor: float | None = None,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> None:
    """Read `source` in whichever format it is and write the new folder `target` in format `to`.

    One tensor is in memory at a time. `dtype` None keeps each weight as it is stored, bit for
    bit. The tokenizer's files are copied; from Hugging Face to Hugging Face the settings of
    generation are too. `n_files` is for "meta", `max_shard_bytes` for "hf"; `rope_factor` is for a
    Meta source (see `open_checkpoint`). Writing to the format of the source is allowed: it changes
    dtype or shards.

    Raises as `open_checkpoint`, `Checkpoint.load_into`, `write_hf` and `write_meta` do, and then
    leaves nothing behind.
    """
    if to not in ("hf", "meta"):
        raise CheckpointError(f"the format to convert to is {to!r}; it must be 'hf' or 'meta'")
    refuse_existing(target)
    checkpoint = open_checkpoint(source, rope_factor=rope_factor)
    if isinstance(checkpoint, QuantizedCheckpoint):
        raise CheckpointError(
            f"{checkpoint.folder} is quantised ({checkpoint.quantization}), and floats cannot be "
            "made of it again; convert the folder that it was made from"
        )
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(state_shapes(checkpoint.config), dtype)
    tensors = checkpoint.tensors(dtype, check_finite=check_finite, progress=progress)
    if to == "meta":
        tokenizer = _find_tokenizer(checkpoint.folder)
        stream_meta(target, checkpoint.config, dtypes, tensors, copies=tokenizer, n_files=n_files)
        return
    stream_hf(
        target,
        checkpoint.config,
        dtypes,
        tensors,
        **companions(checkpoint),
        max_shard_bytes=max_shard_bytes,
    )


def companions(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a folder with a config.json needs besides the weights, as the writers' arguments: the
    ids of the special tokens, the settings of generation, and the tokenizer's files and settings:
    of a Meta folder they say which table of special tokens params.json meant."""
    tokenizer = _find_tokenizer(checkpoint.folder)
    if checkpoint.format == "meta":
        return {
            "special": special_token_ids(checkpoint.config, tokenizer),
            "tokenizer": tokenizer_config(checkpoint.config, tokenizer),
            "copies": tokenizer,
        }
    generation = None
    if (checkpoint.folder / GENERATION_CONFIG).is_file():
        generation = read_json(checkpoint.folder / GENERATION_CONFIG)
    beside = (checkpoint.folder / name for name in _HF_TOKENIZER_FILES)
    return {
        "special": _hf_special(checkpoint),
        "generation": generation,
        "copies": tokenizer + [path for path in beside if path.is_file()],
    }


def _find_tokenizer(folder: Path) -> list[Path]:
    """tokenizer.model and tokenizer.json of the folder, or of the original/ that hubs keep."""
    found = []
    for name in _TOKENIZER_FILES:
        for path in (folder / name, folder / "original" / name):
            if path.is_file():
                found.append(path)
                break
    return found


def _hf_special(checkpoint: Checkpoint) -> dict[str, Any]:
    config = read_json(checkpoint.folder / CONFIG)
    return {key: config[key] for key in _SPECIAL_KEYS if key in config}
