"""Convert a checkpoint between the two formats without ever holding it in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.checks import STORED_DTYPES, check_dtype
from ..errors import CheckpointError
from ..tokenizer.special_tokens import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_FILES
from ..utils.files import check_new_folder
from .adapter import read_adapter
from .adapter_merge import Merge
from .hf import CONFIG
from .names import EMBED, HEAD, state_shapes
from .quantized import QuantizedCheckpoint
from .read import Checkpoint, Format, Progress, open_checkpoint
from .special_tokens import special_token_ids, tokenizer_config
from .stored import read_json
from .write import GENERATION_CONFIG, MAX_SHARD_BYTES, stream_hf, stream_meta

_TOKENIZER_SETTINGS = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
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
    merge: str | Path | None = None,
    rounding: Callable[[str, Tensor], Tensor] | None = None,
    check_finite: bool = True,
    progress: Progress | None = None,
) -> None:
    """Read `source` in whichever format it is and write the new folder `target` in format `to`.

    One tensor is in memory at a time. `dtype` None keeps each weight as it is stored, bit for
    bit. The tokenizer's files and the settings of generation are copied. `n_files` is for "meta",
    `max_shard_bytes` for "hf"; `rope_factor` is for a Meta source (see `open_checkpoint`). Writing
    to the format of the source is allowed: it changes dtype or shards.

    merge     the folder of a LoRA, which becomes part of the weights: in float32, rounded once
    rounding  rounding(name, weight) is what the LoRA was trained on in the weight's place, float32;
              None: the weight itself

    Raises as `open_checkpoint`, `Checkpoint.load_into`, `write_hf` and `write_meta` do, and then
    leaves nothing behind.
    """
    if to not in ("hf", "meta"):
        raise CheckpointError(f"the format to convert to is {to!r}; it must be 'hf' or 'meta'")
    if dtype is not None:
        check_dtype(dtype, STORED_DTYPES)
    check_new_folder(target)
    checkpoint = open_checkpoint(source, rope_factor=rope_factor)
    if isinstance(checkpoint, QuantizedCheckpoint):
        over = checkpoint.quantization
        remedy = "convert the folder that it was made from"
        if merge is not None:
            remedy += ", with --over int4 or int8 where the LoRA was trained over integers"
        raise CheckpointError(
            f"{checkpoint.folder} is quantised ({over}), and floats cannot be made of it again; "
            f"{remedy}"
        )
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(state_shapes(checkpoint.config), dtype)
    config = checkpoint.config
    if merge is not None:
        folded = Merge(config, *read_adapter(merge, config))
        stored = checkpoint.tensors(check_finite=check_finite, progress=progress)
        config, tensors = folded.config, _merged(folded, stored, dtypes, rounding)
        dtypes = {HEAD: dtypes[EMBED], **dtypes}
    else:
        tensors = checkpoint.tensors(dtype, check_finite=check_finite, progress=progress)
    if to == "meta":
        copies = _tokenizer_files(checkpoint.folder)
        generation = checkpoint.folder / GENERATION_CONFIG
        copies += [generation] * generation.is_file()
        stream_meta(target, config, dtypes, tensors, copies=copies, n_files=n_files)
        return
    stream_hf(
        target,
        config,
        dtypes,
        tensors,
        **companions(checkpoint),
        max_shard_bytes=max_shard_bytes,
    )


def _merged(
    merge: Merge,
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    rounding: Callable[[str, Tensor], Tensor] | None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors with the LoRA in them, each rounded to its dtype; and the head, where it was the
    embedding and is no longer."""
    embed = None
    for name, tensor in tensors:
        if rounding is not None:
            tensor = rounding(name, tensor.float())
        if name == EMBED and merge.unties:
            embed = tensor
        yield name, merge(name, tensor.float()).to(dtypes[name])
    if embed is not None:
        yield HEAD, merge(HEAD, embed.float()).to(dtypes[EMBED])


def companions(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a folder with a config.json needs besides the weights, as the writers' arguments: the
    ids of the special tokens, the settings of generation, and the tokenizer's files and settings:
    of a Meta folder they say which table of special tokens params.json meant."""
    files = _tokenizer_files(checkpoint.folder)
    generation = None
    if (checkpoint.folder / GENERATION_CONFIG).is_file():
        generation = read_json(checkpoint.folder / GENERATION_CONFIG)
    if checkpoint.format == "meta":
        special = special_token_ids(checkpoint.config, files)
        tokenizer = tokenizer_config(checkpoint.config, files)
    else:
        special, tokenizer = _hf_special(checkpoint), None
    return {
        "special": special, "generation": generation, "tokenizer": tokenizer, "copies": files
    }  # fmt: skip


def _tokenizer_files(folder: Path) -> list[Path]:
    """tokenizer.model and tokenizer.json of the folder, or of the original/ that hubs keep, and the
    settings that belong to them."""
    found = []
    for name in TOKENIZER_FILES:
        for path in (folder / name, folder / "original" / name):
            if path.is_file():
                found.append(path)
                break
    return found + [path for name in _TOKENIZER_SETTINGS if (path := folder / name).is_file()]


def _hf_special(checkpoint: Checkpoint) -> dict[str, Any]:
    config = read_json(checkpoint.folder / CONFIG)
    return {key: config[key] for key in _SPECIAL_KEYS if key in config}
