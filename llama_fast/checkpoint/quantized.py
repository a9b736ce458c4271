"""Folders of quantised weights, whose tensors lie in the file as they lie in memory.

config.json is that of Hugging Face's format, and its entry "quantization_config" says how each kind
of weight is stored. model.safetensors holds our fused tensors under our own names: of a quantised
one "<name>.qdata", "<name>.scales" and perhaps "<name>.minima", in the layout of the op
`linear`, otherwise the tensor. So a model is mapped and not read: a page of it takes
memory when it is first used, and is shared between processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.quantization import Quantization
from ..config.share import Share
from ..errors import CheckpointError, ConfigError
from .hf import CONFIG, SINGLE
from .names import state_shapes
from .pieces import refuse_few_tensors
from .share import part_of_quantized
from .stored import SafetensorsFile, StoredFile, open_files, read_json

ENTRY, METHOD, VERSION = "quantization_config", "llama_fast", 3


def quantized_contents(
    config: LlamaConfig, quantization: Quantization, dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the file, in its order; `dtypes` gives those of the
    weights that are not quantised, by our names."""
    contents: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in state_shapes(config).items():
        form = quantization.of_weight(name)
        if form is None:
            contents[name] = (shape, dtypes[name])
        else:
            contents |= {f"{name}.{key}": buffer for key, buffer in form.buffers(shape).items()}
    return contents


def quantized_bytes(
    config: LlamaConfig, quantization: Quantization, dtype: torch.dtype = torch.bfloat16
) -> int:
    """The weights of a model in this form, the others in `dtype`."""
    dtypes = dict.fromkeys(state_shapes(config), dtype)
    contents = quantized_contents(config, quantization, dtypes)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in contents.values())


def quantization_entry(quantization: Quantization) -> dict[str, Any]:
    """The entry of config.json."""
    return {"quant_method": METHOD, "version": VERSION, "weights": quantization.to_dict()}


def is_quantized(folder: Path) -> bool:
    """Whether the folder's config.json says that this package has quantised it."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        entry = read_json(folder / CONFIG).get(ENTRY)
    except CheckpointError:  # whoever opens the folder in another format says so
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


@dataclass
class QuantizedCheckpoint:
    """A checked, not yet loaded folder of quantised weights; see `open_checkpoint`."""

    folder: Path
    config: LlamaConfig
    quantization: Quantization
    _file: StoredFile = field(repr=False)
    format: ClassVar[str] = "quantized"

    @property
    def files(self) -> list[Path]:
        return [self._file.path]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantised."""
        return self._file.dtypes["norm.weight"]

    def part(self, share: Share) -> QuantizedCheckpoint:
        """Returns what a rank has of the folder: its config is the part's, and no more is read of
        the file. Raises ConfigError where a block of rows or a group of columns would be cut."""
        file = part_of_quantized(self._file, self.quantization, share)
        return QuantizedCheckpoint(self.folder, share.part, self.quantization, file)

    def tensors(self, *, check_finite: bool = True) -> dict[str, Tensor | dict[str, Tensor]]:
        """By our names: a tensor, or the buffers of a QuantizedWeight by theirs. All of them are
        views of the mapped file, but for columns of a rank's part.

        Raises CheckpointError for scales, minima and floats that are not finite
        (`check_finite=False` skips that, and then no page is read).
        """
        file, found = self._file, {}
        for name in state_shapes(self.config):
            form = self.quantization.of_weight(name)
            keys = [name] if form is None else [f"{name}.{key}" for key in form.buffers((0, 0))]
            views = {key: file.rows(key, 0, file.shapes[key][0]).contiguous() for key in keys}
            for key, view in views.items():
                if check_finite and view.is_floating_point():
                    _refuse_non_finite(file.path, key, view)
            found[name] = (
                views[name]
                if form is None
                else {key.rpartition(".")[2]: view for key, view in views.items()}
            )
        return found


def open_quantized(folder: Path) -> QuantizedCheckpoint:
    """Checks the config and the header of the weights. Raises CheckpointError and ConfigError."""
    content = read_json(folder / CONFIG)
    entry = content.pop(ENTRY)
    try:
        if entry.get("version") != VERSION:
            raise ConfigError(
                f"version is {entry.get('version')!r}; this llama_fast reads version {VERSION}: "
                "quantise the model again"
            )
        quantization = Quantization.from_dict(entry.get("weights"))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {ENTRY}: {error}") from None
    try:
        config = LlamaConfig.from_hf(content)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    (file,) = open_files(SafetensorsFile, [folder / SINGLE])
    _check_contents(file, config, quantization)
    return QuantizedCheckpoint(folder, config, quantization, file)


def _check_contents(file: SafetensorsFile, config: LlamaConfig, quantization: Quantization) -> None:
    refuse_few_tensors(config, file.path.parent / CONFIG, len(file.shapes))
    # Floats keep the dtype in which they are stored.
    stored = {key: dtype for key, dtype in file.dtypes.items() if not isinstance(dtype, str)}
    dtypes = {name: stored.get(name, torch.bfloat16) for name in state_shapes(config)}
    wanted = quantized_contents(config, quantization, dtypes)
    if wrong := sorted(wanted.keys() ^ file.shapes.keys()):
        raise CheckpointError(
            f"{file.path}: {wrong[0]} is {'missing' if wrong[0] in wanted else 'unknown'} (of "
            f"{len(wrong)} such); {CONFIG} belongs to another model, or the file is damaged: "
            "quantise it again"
        )
    for key, (shape, dtype) in wanted.items():
        found = {"U8": torch.uint8}.get(file.dtypes[key], file.dtypes[key])
        if (file.shapes[key], found) != (shape, dtype):
            raise CheckpointError(
                f"{file.path}: {key} is {found} {file.shapes[key]}, but {CONFIG} needs {dtype} "
                f"{shape}; one of the two belongs to another model"
            )


def _refuse_non_finite(path: Path, key: str, values: Tensor) -> None:
    # Not by a sum: in float32 it would be preceded by a copy of the values.
    low, high = values.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{path}: {key} has values that are not finite (NaN or infinity): the file is damaged; "
            "quantise it again"
        )
