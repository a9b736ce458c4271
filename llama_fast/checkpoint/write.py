"""Write checkpoints in Meta's and Hugging Face's formats, a tensor at a time, whole or not at all.

Legend of dims: see `llama_fast.checkpoint.names`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.checks import STORED_DTYPES
from ..errors import CheckpointError, TokenizerError
from ..tokenizer import Tokenizer
from ..tokenizer.special_tokens import TOKENIZER_CONFIG, TOKENIZER_FILES
from ..utils.files import atomic_folder, check_new_folder
from ..utils.shards import whole
from .hf import CONFIG, INDEX, SINGLE
from .meta import PARAMS
from .names import EMBED, HEAD, Weight, hf_to_meta_rows, state_shapes, weights
from .special_tokens import special_token_ids, tokenizer_config
from .writers import PthWriter, SafetensorsWriter

GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000


def write_hf(
    folder: str | Path,
    config: LlamaConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers' LlamaForCausalLM.from_pretrained reads.

    `state` has our names (see `state_shapes`), on any device, in float32, float16 or bfloat16;
    above `max_shard_bytes` the weights are split into shards with an index. `tokenizer_file` is
    copied beside them and gives the ids of the special tokens.

    Raises CheckpointError for a state that does not fit the config and for a disk that is full
    or cannot be written, TokenizerError for a file that is not this model's tokenizer,
    LlamaFastError for a folder that exists and is not empty; then nothing is left behind.
    """
    copies = tokenizer_files(tokenizer_file, config)
    stream_hf(
        folder,
        config,
        _dtypes(config, state),
        ((ours, whole(state[ours])) for ours in state_shapes(config)),
        special=special_token_ids(config, copies),
        tokenizer=tokenizer_config(config, copies),
        copies=copies,
        max_shard_bytes=max_shard_bytes,
    )


def write_meta(
    folder: str | Path,
    config: LlamaConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer_file: str | Path | None = None,
    n_files: int = 1,
) -> None:
    """Write params.json and consolidated.00.pth …, every matrix cut over `n_files` files.

    As Meta's own files do, they hold the head of a tied model too, under a second name. The
    arguments and errors are those of `write_hf`; sizes that `n_files` does not divide are refused.
    """
    stream_meta(
        folder,
        config,
        _dtypes(config, state),
        ((ours, whole(state[ours])) for ours in state_shapes(config)),
        copies=tokenizer_files(tokenizer_file, config),
        n_files=n_files,
    )


def stream_hf(
    folder: str | Path,
    config: LlamaConfig,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    special: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    copies: Iterable[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`write_hf` for tensors that come one by one, in the order of `state_shapes(config)`.

    `dtypes` announces the dtype of each, `special` are the token ids for config.json, `generation`
    what generation_config.json says (default: those ids and Llama's sampling), `tokenizer` what
    tokenizer_config.json does (default: there is none, unless it is copied).
    """
    shards = _plan_shards(config, dtypes, max_shard_bytes)
    total = sum(_nbytes(weight, dtypes) for shard in shards for weight in shard)
    with writing(folder, total) as partial:
        names = [SINGLE]
        if len(shards) > 1:
            count = f"{len(shards):05d}"
            names = [f"model-{i:05d}-of-{count}.safetensors" for i in range(1, len(shards) + 1)]
            places = {w.hf: name for shard, name in zip(shards, names, strict=True) for w in shard}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        parts = _parts(config, tensors)
        for shard, name in zip(shards, names, strict=True):
            contents = {weight.hf: (weight.shape, dtypes[weight.ours]) for weight in shard}
            writer = SafetensorsWriter(partial / name, contents)
            with closing([writer]):
                for _ in shard:
                    weight, tensor = next(parts)
                    writer.add(weight.hf, tensor)
        write_settings(partial, config.to_hf(), dtypes[EMBED], special, generation, tokenizer)
        copy_files(copies, partial)


def stream_meta(
    folder: str | Path,
    config: LlamaConfig,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    copies: Iterable[Path] = (),
    n_files: int = 1,
) -> None:
    """`write_meta` for tensors that come one by one, in the order of `state_shapes(config)`."""
    _refuse_uneven_cut(config, n_files)
    total = sum(
        _nbytes(weight, dtypes) * (n_files if weight.cut is None else 1)
        for weight in weights(config)
    )
    with writing(folder, total) as partial:
        writers = [PthWriter(partial / f"consolidated.{i:02d}.pth") for i in range(n_files)]
        with closing(writers):
            for weight, tensor in _parts(config, tensors):
                if weight.heads:
                    tensor = hf_to_meta_rows(tensor, weight.heads)
                if weight.cut is None:
                    cuts = [tensor] * n_files
                else:
                    cuts = tensor.chunk(n_files, dim=weight.cut)
                for writer, cut in zip(writers, cuts, strict=True):
                    writer.add(weight.meta, cut)
            if config.tied:
                for writer in writers:
                    writer.add_again("output.weight", "tok_embeddings.weight")
        write_json(partial / PARAMS, config.to_meta())
        copy_files(copies, partial)


# --- the plan -------------------------------------------------------------------------------


def _dtypes(config: LlamaConfig, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a state dict, which is checked against the config."""
    shapes = state_shapes(config)
    unknown = sorted(state.keys() - shapes.keys() - ({HEAD} if config.tied else set()))
    missing = sorted(shapes.keys() - state.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the state to write {'lacks' if missing else 'has unknown'} "
            f"{(missing or unknown)[0]} (of {len(missing or unknown)}); it needs exactly the names "
            "of state_shapes(config)"
        )
    for ours, shape in shapes.items():
        if tuple(state[ours].shape) != shape:
            raise CheckpointError(
                f"{ours} has shape {tuple(state[ours].shape)}; the config needs {shape}"
            )
        if state[ours].dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{ours} is {state[ours].dtype}; checkpoints hold float32, float16 or bfloat16"
            )
    return {ours: state[ours].dtype for ours in shapes}


def _nbytes(weight: Weight, dtypes: Mapping[str, torch.dtype]) -> int:
    return math.prod(weight.shape) * dtypes[weight.ours].itemsize


def _plan_shards(
    config: LlamaConfig, dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[list[Weight]]:
    """Matrices in order, a new shard where the next would pass max_bytes."""
    if max_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_bytes}; it must be at least 1")
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights(config):
        size = _nbytes(weight, dtypes)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return shards


def _refuse_uneven_cut(config: LlamaConfig, n_files: int) -> None:
    sizes = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if n_files < 1 or size % n_files:
            raise CheckpointError(
                f"n_files is {n_files}, which must be at least 1 and divide {name}={size}; give a "
                "divisor of all of " + ", ".join(f"{k}={v}" for k, v in sizes.items())
            )


def _parts(
    config: LlamaConfig, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Weight, Tensor]]:
    """Split our tensors into the published matrices, as views."""
    groups = groupby(weights(config), key=lambda weight: weight.ours)
    for (ours, group), (name, tensor) in zip(groups, tensors, strict=True):
        assert ours == name
        for weight in group:
            yield weight, tensor.detach()[weight.row : weight.row + weight.shape[0]]


# --- files ----------------------------------------------------------------------------------


@contextmanager
def writing(folder: str | Path, nbytes: int) -> Iterator[Path]:
    """An atomic folder; raises CheckpointError for a disk without nbytes of room, too."""
    free = shutil.disk_usage(check_new_folder(folder, error=CheckpointError).parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{folder} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or give a folder on another disk"
        )
    with atomic_folder(folder, CheckpointError) as partial:
        yield partial


@contextmanager
def closing(writers: list[PthWriter] | list[SafetensorsWriter]) -> Iterator[None]:
    try:
        yield
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise


def write_settings(
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    special: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    tokenizer: Mapping[str, Any] | None,
) -> None:
    """config.json and generation_config.json, and tokenizer_config.json if there is to be one."""
    main_dtype = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {**config, **special, "torch_dtype": main_dtype})
    if generation is None:
        generation = {**special, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_json(folder / GENERATION_CONFIG, generation)
    if tokenizer is not None:
        write_json(folder / TOKENIZER_CONFIG, tokenizer)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)


def tokenizer_files(file: str | Path | None, config: LlamaConfig) -> list[Path]:
    """Returns the file to copy, or none. Raises TokenizerError for one that is no tokenizer, and
    for one with more tokens than the model has."""
    if file is None:
        return []
    path = Path(file)
    tokens = Tokenizer.from_file(path).vocab_size
    if tokens > config.vocab_size:
        raise TokenizerError(
            f"{path} has {tokens} tokens and the model {config.vocab_size}; give the tokenizer of "
            "this model, or a model with a larger vocab_size"
        )
    if path.name not in TOKENIZER_FILES:
        raise TokenizerError(
            f"{path} would not be found beside weights: a tokenizer is named "
            f"{' or '.join(TOKENIZER_FILES)} there; rename it"
        )
    return [path]
