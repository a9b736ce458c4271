"""Write a folder of quantised weights, a tensor at a time, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.quantization import Quantization
from ..errors import CheckpointError
from .hf import SINGLE
from .names import state_shapes
from .quantized import ENTRY, quantization_entry, quantized_contents
from .special_tokens import special_token_ids
from .write import closing, copy_files, write_settings, writing
from .writers import SafetensorsWriter


def write_quantized(
    folder: str | Path,
    config: LlamaConfig,
    quantization: Quantization,
    state: Mapping[str, Tensor],
) -> None:
    """Write the state dict of a quantised `Llama`; raises as `write_hf` does."""
    dtypes = {name: state[name].dtype for name in state_shapes(config) if name in state}
    contents = quantized_contents(config, quantization, dtypes)
    stream_quantized(
        folder,
        config,
        quantization,
        dtypes,
        ((key, state[key]) for key in contents),
        special=special_token_ids(config),
    )


def stream_quantized(
    folder: str | Path,
    config: LlamaConfig,
    quantization: Quantization,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    special: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    copies: Iterable[Path] = (),
) -> None:
    """`write_quantized` for tensors that come one by one, in the order of `quantized_contents`; the
    rest is as of `stream_hf`."""
    contents = quantized_contents(config, quantization, dtypes)
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in contents.values())
    with writing(folder, total) as partial:
        writer = SafetensorsWriter(partial / SINGLE, contents)
        with closing([writer]):
            for key, tensor in tensors:
                if (tuple(tensor.shape), tensor.dtype) != contents[key]:
                    raise CheckpointError(
                        f"{key} is {tensor.dtype} {tuple(tensor.shape)}; "
                        f"the settings need {contents[key]}"
                    )
                writer.add(key, tensor)
        settings = {**config.to_hf(), ENTRY: quantization_entry(quantization)}
        write_settings(partial, settings, dtypes["norm.weight"], special, generation, tokenizer)
        copy_files(copies, partial)
