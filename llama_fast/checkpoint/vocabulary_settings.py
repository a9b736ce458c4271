"""The files beside a model that name tokens, written for another vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import LlamaConfig
from ..errors import CheckpointError
from ..tokenizer import Tokenizer
from ..tokenizer.special_tokens import ADDED_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from .stored import read_json
from .write import write_json

PRUNED_IDS = "pruned_ids.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Keys of config.json and generation_config.json whose values are ids, or lists of them.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
# Keys of tokenizer_config.json and special_tokens_map.json that list tokens by their names.
_NAMES = ("additional_special_tokens", "extra_special_tokens")


def write_tokenizer_folder(
    folder: Path, tokenizer: Tokenizer, like: Path, config: LlamaConfig | None = None
) -> list[Path]:
    """Writes the files of a tokenizer into a folder that exists, and returns them: tokenizer.json,
    and the settings and chat template of the folder `like`, with this vocabulary's ids.

    Raises CheckpointError where those name a token that this vocabulary lacks.
    """
    tokenizer.save_json(folder / "tokenizer.json")
    named = tokenizer.specials | tokenizer.added
    settings: dict[str, Any] = {}
    if (like / TOKENIZER_CONFIG).is_file():
        settings = read_json(like / TOKENIZER_CONFIG)
    else:
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        settings |= {key: tokenizer.name(id_) for key, id_ in ends.items() if id_ is not None}
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        if config is not None:
            settings["model_max_length"] = config.max_seq_len
    # Classes of Llama 1 and 2 would read a sentencepiece model.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings[ADDED_TOKENS] = _listed(settings.get(ADDED_TOKENS) or {}, tokenizer)
    write_json(folder / TOKENIZER_CONFIG, _names_known(settings, named, TOKENIZER_CONFIG))
    files = [folder / "tokenizer.json", folder / TOKENIZER_CONFIG]
    if (like / SPECIAL_TOKENS_MAP).is_file():
        content = read_json(like / SPECIAL_TOKENS_MAP)
        content = _names_known(content, named, SPECIAL_TOKENS_MAP)
        write_json(folder / SPECIAL_TOKENS_MAP, content)
        files.append(folder / SPECIAL_TOKENS_MAP)
    for name in _TEMPLATES:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
            files.append(folder / name)
    return files


def _listed(before: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens and added words by their ids, with the flags that they had."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    had = {entry.get("content"): entry for entry in before.values() if isinstance(entry, Mapping)}
    words = [(id_, name, True) for name, id_ in tokenizer.specials.items()]
    words += [(id_, name, False) for name, id_ in tokenizer.added.items()]
    return {
        str(id_): had.get(name, {"content": name, **flags, "special": special})
        for id_, name, special in sorted(words)
    }


def _names_known(settings: dict[str, Any], named: Mapping[str, int], file: str) -> dict[str, Any]:
    """The settings without names that the vocabulary lacks, in lists of names. Raises for one that
    begins, ends or pads a text."""
    kept = dict(settings)
    for key in _NAMES:
        listed = kept.get(key)
        if isinstance(listed, list):
            kept[key] = [token for token in listed if _text(token) in named]
        elif isinstance(listed, Mapping):
            kept[key] = {role: token for role, token in listed.items() if _text(token) in named}
    for key, token in kept.items():
        name = _text(token)
        # A name that the old vocabulary lacked as well says nothing of this one.
        if key.endswith("_token") and isinstance(name, str) and name.startswith("<|reserved_"):
            if name not in named:
                raise CheckpointError(
                    f"{file} names {name} as its {key}, and the new vocabulary gave its id away; "
                    "train the vocabulary without the reserved tokens"
                )
    return kept


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def remap(settings: Mapping[str, Any], ids: Mapping[int, int] | None, file: str) -> dict[str, Any]:
    """Returns the settings with the new ids of the tokens that they name by id; ids None changes
    nothing. Raises CheckpointError for a token that is not kept."""
    if ids is None:
        return dict(settings)

    def new(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [new(entry, key) for entry in value]
        if type(value) is int and value >= 0 and value not in ids:
            raise CheckpointError(
                f"{file} has {key}: {value}, a token that the shorter vocabulary does not keep; "
                "correct it, or let the corpus hold that token"
            )
        return ids[value] if type(value) is int and value >= 0 else value

    if settings.get("sequence_bias"):
        raise CheckpointError(f"{file} has a sequence_bias by ids; remove it before pruning")
    return {
        key: new(value, key) if key.endswith("_token_id") or key in _LISTS else value
        for key, value in settings.items()
    }
