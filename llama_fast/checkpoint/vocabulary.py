"""A model's folder with another vocabulary: rows of the embedding and the head for it.

- `extend_folder`: an old token keeps its row, bit for bit; a new one gets the mean of the rows of
  the old tokens that spell it, in the embedding and in the head apart.
- `prune_folder`: the rows of the tokens that are kept, bit for bit.

The rows are padded with zeros to a multiple of 64, for kernels that take rows by tiles; config.json
says how many are no token's (`vocab_padding`), and generation_config.json asks other programs not
to draw them (`suppress_tokens`). Both are written in Hugging Face's format: Meta's tokenizer.model
cannot hold tokens after the special ones.

Legend of dims: V vocabulary, C model dim.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..errors import CheckpointError, TokenizerError
from ..tokenizer import Tokenizer, vocabulary
from ..utils.files import check_new_folder
from .convert import companions
from .names import EMBED, HEAD
from .quantized import QuantizedCheckpoint
from .read import Checkpoint, Progress, open_checkpoint
from .stored import read_json
from .vocabulary_settings import PRUNED_IDS, remap, write_tokenizer_folder
from .write import stream_hf, write_json

MULTIPLE = 64  # of the rows


def padded_config(config: LlamaConfig, n_tokens: int, multiple: int = MULTIPLE) -> LlamaConfig:
    """Returns the config of the model with rows for `n_tokens` tokens, padded to a multiple."""
    if type(multiple) is not int or multiple < 1:
        raise CheckpointError(f"the rows' multiple is {multiple!r}; give a whole number from 1 on")
    rows = -(-n_tokens // multiple) * multiple
    return replace(config, vocab_size=rows, vocab_padding=rows - n_tokens)


def extended_rows(
    weight: Tensor,
    new: Mapping[int, list[int]],
    n_old: int,
    n_rows: int,
) -> Tensor:
    """Returns the rows (n_rows,C) of a longer vocabulary, in the weight's dtype.

    weight (V,C): the old ones, of which the first n_old are tokens'. new: of each new id the old
    ids that spell it, whose rows' mean it gets (summed in float64). The rest are zeros.
    """
    rows = weight.new_zeros((n_rows, weight.shape[1]))
    rows[:n_old] = weight[:n_old]
    for id_, spelled in new.items():
        rows[id_] = weight[spelled].double().mean(0)
    return rows


def kept_rows(weight: Tensor, kept: list[int], n_rows: int) -> Tensor:
    """Returns the rows (n_rows,C) of the ids that are kept, in their order, then zeros."""
    rows = weight.new_zeros((n_rows, weight.shape[1]))
    rows[: len(kept)] = weight[torch.tensor(kept, device=weight.device)]
    return rows


def check_fits(tokenizer: Tokenizer, config: LlamaConfig, what: object) -> None:
    """Raises TokenizerError where a vocabulary has more tokens than a model has rows."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {what} has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size} rows: it belongs to another model"
        )


def extend_folder(
    source: str | Path,
    longer: Tokenizer,
    target: str | Path,
    *,
    multiple: int = MULTIPLE,
    input_rows: Tensor | None = None,
    progress: Progress | None = None,
) -> dict[int, list[int]]:
    """Writes the model of folder `source` with the rows of a longer vocabulary as folder `target`;
    returns the new ids, each with the old ids that spell it. input_rows (n,C): the embedding's rows
    of the new ids, in their order, in place of the means; the head's too where it is tied.

    One weight at a time is in memory. Raises TokenizerError for a vocabulary that is no extension
    of the model's, CheckpointError for a folder that cannot be read or is quantised, LlamaFastError
    for a target that exists; then nothing is left behind.
    """
    checkpoint, old = _open(source, target)
    new = vocabulary.new_tokens(longer, old)
    config = padded_config(checkpoint.config, longer.vocab_size, multiple)

    def rows(name: str, weight: Tensor) -> Tensor:
        made = extended_rows(weight, new, old.vocab_size, config.vocab_size)
        if input_rows is not None and name == EMBED:
            made[list(new)] = input_rows.to(made)
        return made

    _write(
        checkpoint,
        target,
        config,
        longer,
        rows,
        ids=None,
        progress=progress,
    )
    return new


def prune_folder(
    source: str | Path,
    pruned: vocabulary.Pruned,
    target: str | Path,
    *,
    multiple: int = MULTIPLE,
    progress: Progress | None = None,
) -> None:
    """Writes the model of folder `source` with the rows of a shorter vocabulary as folder `target`,
    and in it `pruned_ids.json`: the old id of each new one ("old_ids", a list), and the new id of
    each old one that was kept ("new_ids").

    Ids in its settings are the new ones. Raises as `extend_folder`, and CheckpointError where the
    settings name a token that is not kept.
    """
    checkpoint, old = _open(source, target)
    short, kept = pruned
    words = {**short.ranks, **short.specials, **short.added}
    before = {**old.ranks, **old.specials, **old.added}
    if any(before.get(word) != kept[id_] for word, id_ in words.items()):
        raise TokenizerError(
            f"the shorter vocabulary was not made from that of {source}: prune that one"
        )
    config = padded_config(checkpoint.config, short.vocab_size, multiple)
    _write(
        checkpoint,
        target,
        config,
        short,
        lambda _, weight: kept_rows(weight, kept, config.vocab_size),
        ids=pruned.new_ids(),
        progress=progress,
    )


def read_pruned_ids(folder: str | Path) -> list[int]:
    """Returns the old id of each id of a folder that `prune_folder` wrote."""
    return read_json(Path(folder) / PRUNED_IDS)["old_ids"]


def _open(source: str | Path, target: str | Path) -> tuple[Checkpoint, Tokenizer]:
    check_new_folder(target)
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, QuantizedCheckpoint):
        raise CheckpointError(
            f"{checkpoint.folder} is quantised ({checkpoint.quantization}); change the vocabulary "
            "of the folder that it was made from, and quantise the result"
        )
    old = Tokenizer.from_pretrained(checkpoint.folder)
    check_fits(old, checkpoint.config, checkpoint.folder)
    return checkpoint, old


def _write(
    checkpoint: Checkpoint,
    target: str | Path,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    rows: Callable[[str, Tensor], Tensor],
    *,
    ids: Mapping[int, int] | None,
    progress: Progress | None,
) -> None:
    with tempfile.TemporaryDirectory() as beside:
        files = write_tokenizer_folder(Path(beside), tokenizer, checkpoint.folder, config)
        if ids is not None:
            old_ids = sorted(ids)
            write_json(files[0].parent / PRUNED_IDS, {"old_ids": old_ids, "new_ids": ids})
            files.append(files[0].parent / PRUNED_IDS)
        about: dict[str, Any] = companions(checkpoint)
        special = remap(about["special"], ids, "config.json")
        generation = about["generation"]
        if generation is None:
            generation = {**special, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        else:
            generation = _drop_padding(generation, checkpoint.config)
            generation = remap(generation, ids, "generation_config.json")
        stream_hf(
            target,
            config,
            checkpoint.dtypes,
            (
                (name, rows(name, tensor) if name in (EMBED, HEAD) else tensor)
                for name, tensor in checkpoint.tensors(progress=progress)
            ),
            special=special,
            generation=_suppress_padding(generation, config),
            copies=files,
        )


def _drop_padding(generation: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The settings of generation without the padding of the model that is read: its ids may be
    tokens of the new one."""
    tokens = config.vocab_size - config.vocab_padding
    suppressed = [id_ for id_ in generation.get("suppress_tokens") or () if id_ < tokens]
    others = {key: value for key, value in generation.items() if key != "suppress_tokens"}
    return {**others, "suppress_tokens": suppressed} if suppressed else others


def _suppress_padding(generation: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The settings of generation that keep transformers from drawing the rows of no token."""
    suppressed = list(generation.get("suppress_tokens") or ())
    suppressed += range(config.vocab_size - config.vocab_padding, config.vocab_size)
    return {**generation, "suppress_tokens": suppressed} if suppressed else generation
