"""Weights of other kinds than are read here, told by the names of their files."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from .stored import read_json

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".+-\d{5}-of-(\d{5})\.safetensors")

# What else weights are stored as: a pattern of names, what that is, and what to do.
_KINDS = (
    (
        "meta_model_*.pt",
        "torchtune's name for weights in Meta's format",
        "name it consolidated.00.pth, beside the params.json of the model that was fine-tuned",
    ),
    (
        "hf_model_*.pt",
        "torchtune's name for weights with Hugging Face's keys",
        "let torchtune write safetensors (its checkpointer FullModelHFCheckpointer)",
    ),
    (
        "torchtune_model_*.pt",
        "torchtune's own format",
        "let torchtune write Hugging Face's (its checkpointer FullModelHFCheckpointer)",
    ),
    ("model.pth", "gpt-fast's own format", "give the folder that it was converted from"),
    (
        "model_int[48]*.pth",
        "gpt-fast's own format of quantised weights",
        "give the folder that it was converted from, and quantise it with llama-fast quantize",
    ),
    (
        "lit_model.pth",
        "LitGPT's own format",
        "write Hugging Face's with litgpt convert_from_litgpt, or give the folder that it was "
        "converted from",
    ),
    ("*.gguf", "llama.cpp's format", "give the folder of safetensors that it was made from"),
    (
        "consolidated*.safetensors",
        "Mistral's own format",
        "give the folder with model.safetensors that is published beside it",
    ),
    (
        "pytorch_model*.bin",
        "the pickled format of older transformers",
        "save it again with transformers' save_pretrained, which writes safetensors",
    ),
)


def refuse_other_weights(folder: Path) -> None:
    """Raises CheckpointError where a folder holds weights of a kind that is known, but not read."""
    if (folder / ADAPTER).is_file() or any(folder.glob("adapter_model.*")):
        raise CheckpointError(
            f"{folder} holds a LoRA adapter{_base_of(folder)} and not the weights of a model; give "
            "the folder of the model here, and this one with --adapter (train.load_adapter in "
            "Python)"
        )
    for pattern, what, remedy in _KINDS:
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(f"{found[0]} is not read: it is {what}; {remedy}")
    refuse_shards_without_index(folder)


def refuse_shards_without_index(folder: Path) -> None:
    """Raises CheckpointError for shards of whatever name, where nothing says what lies in which."""
    if (folder / INDEX).is_file():
        return
    shards = [found for p in sorted(folder.iterdir()) if (found := _SHARD.fullmatch(p.name))]
    if not shards:
        return
    first, count = shards[0].group(), int(shards[0].group(1))
    writer = "torchtune's " if first.startswith("ft-model") else ""
    raise CheckpointError(
        f"{folder} holds {len(shards)} of {count} {writer}shards but no {INDEX}, which says what "
        f"lies where (the first is {first}); copy or download it too"
    )


def _base_of(folder: Path) -> str:
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except CheckpointError:
        return ""
    return f" of {base}" if isinstance(base, str) and base else ""
