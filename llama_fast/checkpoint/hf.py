"""Open a Hugging Face folder: config.json and model.safetensors, or shards with an index."""

from __future__ import annotations

from pathlib import Path

from ..config import LlamaConfig
from ..errors import CheckpointError, ConfigError
from .names import EMBED, weights
from .others import INDEX, refuse_other_weights
from .pieces import (
    Layout,
    Piece,
    refuse_few_tensors,
    refuse_wrong_dtypes,
    refuse_wrong_keys,
    same_matrix,
)
from .stored import SafetensorsFile, StoredFile, open_files, read_json

CONFIG, SINGLE = "config.json", "model.safetensors"


def is_hf(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


def open_hf(folder: Path) -> Layout:
    """Find and check every matrix of the folder; reads headers, and no weights but a tied head's.

    Raises CheckpointError for files that are missing, too many or damaged, and for keys and
    shapes that the config contradicts; ConfigError for a config that is no Llama 3's.
    """
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing; copy it from where the weights came from")
    try:
        config = LlamaConfig.from_hf(read_json(config_file))
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from None
    paths = _weight_files(folder)
    layout = Layout(config, config_file, open_files(SafetensorsFile, paths))
    where = _by_key(layout.files)
    _check_index(folder, where)
    refuse_few_tensors(config, config_file, len(where))

    wanted = {weight.hf for weight in weights(config)}
    embed = next(weight.hf for weight in weights(config) if weight.ours == EMBED)
    head = "lm_head.weight"
    if config.tied and head in where:
        # Some writers keep both names of a tied matrix, and some only the head's.
        if embed not in where:
            where[embed] = where.pop(head)
        else:
            _refuse_other_head(layout, (where[embed], embed), (where.pop(head), head))
    elif not config.tied and head not in where and embed in where:
        raise CheckpointError(
            f"{folder}: {head} is missing; if this model's head is its embedding, {CONFIG} must "
            'say "tie_word_embeddings": true'
        )
    refuse_wrong_keys(layout, where, wanted, folder)

    for weight in weights(config):
        file = where[weight.hf]
        key = weight.hf if weight.hf in file.shapes else head
        if file.shapes[key] != weight.shape:
            raise CheckpointError(
                f"{file.path}: {key} has shape {file.shapes[key]}, but {CONFIG} needs "
                f"{weight.needs('hf')}; one of the two belongs to another model"
            )
        layout.pieces[weight] = [Piece(file, key, 0, 0, weight.shape[0])]
    refuse_wrong_dtypes(layout)
    return layout


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the single file; raises for others beside them."""
    present = {path.name for path in folder.glob("model*.safetensors")}
    if not (folder / INDEX).is_file():
        if SINGLE not in present:
            refuse_other_weights(folder)
            raise CheckpointError(
                f"{folder} has no {SINGLE} and no {INDEX}; copy or download the weights"
            )
        named = {SINGLE}
    else:
        named = set(_weight_map(folder).values())
    extra = sorted(present - named)
    if extra:
        raise CheckpointError(
            f"{folder / extra[0]} is an extra shard: "
            + (
                f"{INDEX} does not name it"
                if (folder / INDEX).is_file()
                else f"{SINGLE} is there without {INDEX}"
            )
            + "; remove the one that is left over from another download"
        )
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]} is missing ({len(missing)} of the {len(named)} files that "
            f"{INDEX} names); copy or download it"
        )
    return [folder / name for name in sorted(named)]


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path} has no "weight_map" object from weight to file name')
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path}: {key} lies in {name!r}, which is no file name inside the folder"
            )
    return weight_map


def _by_key(files: list[StoredFile]) -> dict[str, StoredFile]:
    where: dict[str, StoredFile] = {}
    for file in files:
        for key in file.shapes:
            if key in where:
                raise CheckpointError(
                    f"{key} is in both {where[key].path} and {file.path.name}; the shards come "
                    "from different downloads"
                )
            where[key] = file
    return where


def _check_index(folder: Path, where: dict[str, StoredFile]) -> None:
    if not (folder / INDEX).is_file():
        return
    for key, name in _weight_map(folder).items():
        if key not in where or where[key].path.name != name:
            raise CheckpointError(
                f"{folder / name} does not hold {key}, though {INDEX} says so; the shard and the "
                "index come from different downloads"
            )


def _refuse_other_head(
    layout: Layout, embed: tuple[StoredFile, str], head: tuple[StoredFile, str]
) -> None:
    if not same_matrix(embed, head):
        raise CheckpointError(
            f"{head[0].path}: {head[1]} differs from {embed[1]}, though {CONFIG} says "
            '"tie_word_embeddings": true; set it to false to use the head that is stored'
        )
