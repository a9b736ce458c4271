"""The folder of a LoRA in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each tensor's name begins with "base_model.model.", then comes the module of a Hugging Face Llama:

    ….q_proj.lora_A.weight (r, in)   ….lora_B.weight (out, r)   ….lora_magnitude_vector (out,)
    ….embed_tokens.lora_embedding_A (r, V)   ….lora_embedding_B (C, r)
    ….embed_tokens.weight, ….lm_head.weight (V, C): modules_to_save
    ….embed_tokens.token_adapter.trainable_tokens_delta (n, C): whole rows, not differences

Rows of q and k are in Hugging Face's order, which is that of our weights too, of whichever format
they were loaded from. Legend of dims: C model dim, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..errors import CheckpointError, ConfigError
from ..utils.files import given_path
from .adapter_config import (
    EMBED_MODULE,
    HEAD_MODULE,
    AdapterConfig,
    Part,
    from_peft,
    parts,
    to_peft,
)
from .stored import SafetensorsFile, read_json
from .write import closing, write_json, writing
from .writers import SafetensorsWriter

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
ROWS_KEY = "token_adapter.trainable_tokens_delta"
BASE_KEY = "base_layer.weight"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / SETTINGS).is_file()


def adapter_shapes(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that the adapter of such a model has, by its name without
    the prefix. Raises ConfigError where the settings fit no module of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts(config):
        if adapter.adapts(part):
            shapes |= _low_rank_shapes(part, adapter)
        if adapter.saves(part):
            shapes[f"{part.hf}.weight"] = part.shape
        if rows := adapter.rows_of(part, config.tied):
            _refuse_rows(part, rows, adapter)
            if part.hf != HEAD_MODULE or not adapter.shares_rows(config.tied):
                shapes[f"{part.hf}.{ROWS_KEY}"] = (len(rows), part.shape[1])
    _refuse_unmatched(config, adapter)
    return shapes


def _low_rank_shapes(part: Part, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    rank, (rows, columns) = adapter.rank_of(part.hf), part.shape
    if not part.is_linear:
        if adapter.dora:
            raise ConfigError(
                f"use_dora with {part.hf} among the targets: llama_fast computes DoRA of linear "
                "layers; leave the embedding out, or name it in modules_to_save"
            )
        return {
            f"{part.hf}.lora_embedding_A": (rank, rows),
            f"{part.hf}.lora_embedding_B": (columns, rank),
        }
    shapes = {f"{part.hf}.lora_A.weight": (rank, columns), f"{part.hf}.lora_B.weight": (rows, rank)}
    if adapter.dora:
        shapes[f"{part.hf}.lora_magnitude_vector"] = (rows,)
    return shapes


def _refuse_rows(part: Part, rows: tuple[int, ...], adapter: AdapterConfig) -> None:
    if part.hf not in (EMBED_MODULE, HEAD_MODULE):
        raise ConfigError(
            f"rows of {part.hf} are to be trained; only those of embed_tokens and lm_head can be"
        )
    if min(rows) < 0 or max(rows) >= part.shape[0]:
        raise ConfigError(
            f"rows {min(rows)} to {max(rows)} of {part.hf} are to be trained; it has "
            f"{part.shape[0]}, from 0 on. Give the model the rows of new tokens first"
        )
    if adapter.saves(part) or adapter.adapts(part):
        raise ConfigError(
            f"{part.hf} is to be trained by rows and in another way too; choose one of them"
        )


def _refuse_unmatched(config: LlamaConfig, adapter: AdapterConfig) -> None:
    """Raises ConfigError for a name that is no module's: it would be left untrained, unnoticed."""
    known = parts(config)
    names = sorted({part.hf.rpartition(".")[2] for part in known if len(part.shape) == 2})
    wanted = list(adapter.targets) if not isinstance(adapter.targets, str) else []
    for name in (*wanted, *adapter.modules_to_save, *adapter.rows):
        if not any(part.hf == name or part.hf.endswith(f".{name}") for part in known):
            raise ConfigError(f"the model has no module {name!r}; there are {', '.join(names)}")
    fused = [p.hf for p in known if adapter.saves(p) and _is_layer_matrix(p)]
    if fused:
        raise ConfigError(
            f"{fused[0]} is to be trained whole, which is offered for embed_tokens, lm_head and "
            "norms; name it in target_modules, or train all weights"
        )
    found = [part for part in known if adapter.adapts(part) or adapter.saves(part)]
    if not found and not adapter.rows:
        raise ConfigError(
            f"the targets {adapter.targets!r} are no modules of the model; there are "
            f"{', '.join(names)}, or all-linear"
        )


def _is_layer_matrix(part: Part) -> bool:
    return part.is_linear and part.hf != HEAD_MODULE


def read_adapter(
    folder: str | Path, config: LlamaConfig
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Reads an adapter of a model with this config → its settings, and its tensors on the CPU as
    they are stored, by their names without the prefix.

    Raises CheckpointError for a folder or file that is missing or damaged, and for tensors that
    are missing, too many, of a wrong shape or not finite; ConfigError for settings that
    `from_peft` refuses.
    """
    folder = given_path(folder, "the folder of an adapter", CheckpointError)
    path = folder / WEIGHTS
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapter: {SETTINGS} is missing")
    if not path.is_file():
        old = (folder / OLD_WEIGHTS).is_file()
        hint = f"; {OLD_WEIGHTS} is there: save it anew with PEFT" if old else ""
        raise CheckpointError(f"{path} is missing{hint}")
    adapter = from_peft(read_json(folder / SETTINGS), str(folder / SETTINGS))
    try:
        shapes = adapter_shapes(config, adapter)
    except ConfigError as error:
        raise ConfigError(f"{folder / SETTINGS}: {error}") from None
    file = SafetensorsFile(path)
    _refuse_wrong_tensors(file, shapes, config, path)
    tensors = {}
    for key, shape in file.shapes.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(BASE_KEY):
            continue  # a copy of the model's own weight, which PEFT writes beside its adapters
        tensor = file.rows(key, 0, shape[0]).clone()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} has values that are not finite")
        tensors[name] = tensor
    file.release()
    return adapter, tensors


def _refuse_wrong_tensors(
    file: SafetensorsFile, shapes: dict[str, tuple[int, ...]], config: LlamaConfig, path: Path
) -> None:
    found = {key.removeprefix(PREFIX): key for key in file.shapes}
    optional = {f"{m}.{BASE_KEY}" for m in (EMBED_MODULE, HEAD_MODULE)}
    if config.tied:  # PEFT may write what the two share once or twice
        optional |= {f"{HEAD_MODULE}.weight", f"{HEAD_MODULE}.{ROWS_KEY}"}
    missing = sorted(shapes.keys() - found.keys() - optional)
    unknown = sorted(found.keys() - shapes.keys() - optional)
    if missing:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing (of {len(missing)} tensors that {SETTINGS} and the "
            "model need); the adapter is incomplete, or belongs to another model"
        )
    if unknown:
        raise CheckpointError(
            f"{path}: unknown {unknown[0]} (of {len(unknown)} tensors); the adapter belongs to "
            f"another model, or {SETTINGS} to another adapter"
        )
    for name, key in found.items():
        if name in shapes and file.shapes[key] != shapes[name]:
            raise CheckpointError(
                f"{path}: {key} has shape {file.shapes[key]}; this model and {SETTINGS} need "
                f"{shapes[name]}"
            )
        if isinstance(file.dtypes[key], str):
            raise CheckpointError(
                f"{path}: {key} is stored as {file.dtypes[key]}; it must be float32, bfloat16 or "
                "float16"
            )


def write_adapter(
    folder: str | Path, config: LlamaConfig, adapter: AdapterConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Writes the new folder of an adapter, which PEFT reads; whole, or not at all.

    tensors  by the names of `adapter_shapes`; the head of a tied model may be there too
    Raises CheckpointError for tensors that do not fit and for a disk that is full, LlamaFastError
    for a folder that exists.
    """
    shapes = adapter_shapes(config, adapter)
    wrong = sorted(shapes.keys() ^ tensors.keys())
    wrong = wrong or [name for name in shapes if tuple(tensors[name].shape) != shapes[name]]
    if wrong:
        raise CheckpointError(f"{wrong[0]} of the adapter does not fit its settings")
    contents = {PREFIX + name: (shapes[name], tensors[name].dtype) for name in sorted(shapes)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with writing(folder, nbytes) as partial:
        writer = SafetensorsWriter(partial / WEIGHTS, contents)
        with closing([writer]):
            for key in contents:
                writer.add(key, tensors[key.removeprefix(PREFIX)])
        write_json(partial / SETTINGS, to_peft(adapter, config.tied))
