"""Quantise a folder of a model into another, a weight at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .atomic import refuse_existing
from .checkpoint import (
    Checkpoint,
    Progress,
    QuantizedCheckpoint,
    companions,
    open_checkpoint,
    state_shapes,
    stream_quantized,
)
from .errors import ConfigError
from .quantize import Quantization, round_weight


def quantize_folder(
    source: str | Path,
    target: str | Path,
    quantization: str | Quantization,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Read a folder of float weights, in either format, and write the new folder `target` with
    quantised ones, which `Llama.from_pretrained` maps into memory.

    quantization  "int8", "int4" or a Quantization
    dtype         of the weights that stay floats, and so of the activations; None: as stored
    progress      called as progress(bytes done, bytes in all, name) while weights are read

    One weight at a time is in memory. The tokenizer's files and the settings of generation are
    copied. Raises ConfigError for settings that are none and for a source that is quantised, and
    otherwise as `open_checkpoint` and `write_hf` do, and then leaves nothing behind.
    """
    settings = Quantization.of(quantization)
    refuse_existing(target)
    checkpoint = open_float_checkpoint(source)
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(state_shapes(checkpoint.config), dtype)

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, weight in checkpoint.tensors(progress=progress):
            form = settings.of_weight(name)
            if form is None:
                yield name, weight.to(dtypes[name])
            else:
                for key, buffer in round_weight(weight, form).state_dict().items():
                    yield f"{name}.{key}", buffer

    beside = companions(checkpoint)
    if checkpoint.format == "meta":
        # The tokenizer takes from it which table of special tokens is meant.
        beside["copies"] = [*beside["copies"], checkpoint.folder / "params.json"]
    stream_quantized(target, checkpoint.config, settings, dtypes, parts(), **beside)


def open_float_checkpoint(folder: str | Path) -> Checkpoint:
    """`open_checkpoint`, and ConfigError for weights that are quantised."""
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, QuantizedCheckpoint):
        raise ConfigError(
            f"{folder} is quantised already ({checkpoint.quantization}); give the folder that it "
            "was made from"
        )
    return checkpoint
