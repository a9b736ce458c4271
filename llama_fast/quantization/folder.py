"""Quantise a folder of a model into another, a weight or a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import (
    Checkpoint,
    Progress,
    QuantizedCheckpoint,
    companions,
    open_checkpoint,
    state_shapes,
    stream_quantized,
)
from ..config.checks import STORED_DTYPES, check_dtype
from ..config.quantization import Quantization
from ..errors import ConfigError
from ..model import Llama
from ..nn import Linear, rope_tables
from ..ops import QuantizedWeight
from ..ops.quantized_weight import round_rows, round_weight
from ..utils.files import check_new_folder
from .gptq import Inputs, round_compensated


def quantize_folder(
    source: str | Path,
    target: str | Path,
    quantization: str | Quantization,
    *,
    calibration: Tensor | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Read a folder of float weights, in either format, and write the new folder `target` with
    quantised ones, which `Llama.from_pretrained` maps into memory.

    quantization  "int8", "int4" or a Quantization
    calibration   tokens (B,T) int64 of a text: layers and head are rounded so that their
                  outputs on it change least (`.gptq`). None: to the nearest quantised values
    dtype         of the weights that stay floats, and so of the activations; None: as stored
    progress      called as progress(bytes done, bytes in all, name) while weights are read

    One weight at a time is in memory; with a calibration one layer, and what it made of the text.
    The tokenizer's files and the settings of generation are copied. Raises ConfigError for settings
    that are none, for tokens that the model cannot take and for a source that is quantised, and
    otherwise as `open_checkpoint` and `write_hf` do, and then leaves nothing behind.
    """
    settings = Quantization.of(quantization)
    if dtype is not None:
        check_dtype(dtype, STORED_DTYPES)
    check_new_folder(target)
    checkpoint = open_float_checkpoint(source)
    dtypes = dict.fromkeys(state_shapes(checkpoint.config), dtype or checkpoint.dtype)

    def stored() -> Iterator[tuple[str, Tensor]]:
        if calibration is None:
            weights = _nearest(checkpoint, settings, progress)
        else:
            weights = _calibrated(checkpoint, settings, calibration, progress)
        for name, weight in weights:
            if isinstance(weight, QuantizedWeight):
                for key, buffer in weight.state_dict().items():
                    yield f"{name}.{key}", buffer
            else:
                yield name, weight.to(dtypes[name])

    stream_quantized(
        target, checkpoint.config, settings, dtypes, stored(), **companions(checkpoint)
    )


def open_float_checkpoint(folder: str | Path) -> Checkpoint:
    """`open_checkpoint`, and ConfigError for weights that are quantised."""
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, QuantizedCheckpoint):
        raise ConfigError(
            f"{folder} is quantised already ({checkpoint.quantization}); give the folder that it "
            "was made from"
        )
    return checkpoint


def check_tokens(checkpoint: Checkpoint | QuantizedCheckpoint, tokens: Tensor) -> None:
    """Raises ConfigError for tokens that are no text of this model."""
    config = checkpoint.config
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ConfigError(
            f"the text's tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be torch.int64 "
            "(B,T), and not empty"
        )
    if tokens.shape[1] > config.max_seq_len or not 0 <= tokens.min() <= tokens.max() < (
        config.vocab_size
    ):
        raise ConfigError(
            f"the text has rows of {tokens.shape[1]} tokens with ids {int(tokens.min())} to "
            f"{int(tokens.max())}; {checkpoint.folder} has a context of {config.max_seq_len} and "
            f"ids below {config.vocab_size}"
        )


def layers(
    checkpoint: Checkpoint, progress: Progress | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a float model in their order: "embed", "layers.0", …, "norm", "head".

    Each holds its weights until the next is asked for; an embedding to the end where it is the head
    too. So the memory is that of one layer.
    """
    model = Llama(checkpoint.config, device="meta", dtype=checkpoint.dtype)
    shapes = state_shapes(checkpoint.config)
    tensors = checkpoint.tensors(progress=progress)
    for part, weights in groupby(tensors, key=lambda item: _part(item[0])):
        for name, weight in weights:
            model.set_weight(name, weight)
        yield part, model.get_submodule(part)
        if not (part == "embed" and checkpoint.config.tied):
            for name, shape in shapes.items():
                if _part(name) == part:
                    model.set_weight(name, torch.empty(shape, device="meta"))
    if checkpoint.config.tied:
        model.tie()
        yield "head", model.head


def _part(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def _nearest(
    checkpoint: Checkpoint, settings: Quantization, progress: Progress | None
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    shapes = state_shapes(checkpoint.config)
    for name, rows in checkpoint.rows(progress=progress):
        yield name, round_rows(shapes[name], rows, settings.of_weight(name))


@torch.no_grad()
def _calibrated(
    checkpoint: Checkpoint, settings: Quantization, tokens: Tensor, progress: Progress | None
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every weight in its order. A layer sees what the quantised layers before it make of the
    tokens, so that its rounding makes up for theirs as well. A head sees what the float layers do:
    it may be the embedding, which comes first."""
    check_tokens(checkpoint, tokens)
    head = "embed" if checkpoint.config.tied else "head"
    T, config = tokens.shape[1], checkpoint.config
    cos, sin = rope_tables(config.head_dim, T, config.rope_theta, config.rope_scaling)
    rounded = settings.of_weight(f"{head}.weight") is not None
    of_head = _hessian_of_head(checkpoint, tokens, cos, sin) if rounded else None
    update, x = None, None
    for part, module in layers(checkpoint, progress):
        if part == "head" and checkpoint.config.tied:
            continue
        hessians = {"": of_head} if part == head else {}
        if part.startswith("layers."):
            hessians = _hessians(module, update, x, cos, sin)
        for name, weight in list(module.named_parameters()):
            form = settings.of_weight(f"{part}.{name}")
            if form is not None:
                owner = name.rpartition(".")[0]
                H = hessians.pop(owner, None)
                weight = (
                    round_weight(weight, form) if H is None else round_compensated(weight, H, form)
                )
                module.get_submodule(owner).weight = weight
            yield f"{part}.{name}", weight
        if part == "embed":
            x = module(tokens).to(checkpoint.dtype)
        elif part.startswith("layers."):
            update, x = module(update, x, cos, sin, None)


def _hessian_of_head(checkpoint: Checkpoint, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    update, x, inputs = None, None, Inputs()
    for part, module in layers(checkpoint):
        if part == "embed":
            x = module(tokens)
        elif part.startswith("layers."):
            update, x = module(update, x, cos, sin, None)
        elif part == "norm":
            inputs(module, module(update, x)[:1])
    return inputs.H


def _hessians(layer: nn.Module, *arguments: Tensor | None) -> dict[str, Tensor]:
    """H of every linear of a layer, by its name, when the layer is called with these."""
    gathered = {name: Inputs() for name, m in layer.named_modules() if isinstance(m, Linear)}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(inputs)
        for name, inputs in gathered.items()
    ]
    layer(*arguments, None)
    for hook in hooks:
        hook.remove()
    return {name: inputs.H for name, inputs in gathered.items()}
