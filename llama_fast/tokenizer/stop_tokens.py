"""The tokens that a checkpoint's folder says end a text, besides Llama 3's own: fine-tunes name an
added word there, such as `<|im_end|>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import TokenizerError
from .files import load_json
from .special_tokens import TOKENIZER_CONFIG


def folder_stop_ids(folder: Path, ids: Mapping[str, int]) -> set[int]:
    """Returns those that `eos_token_id` of config.json and generation_config.json lists, and that
    `eos_token` of tokenizer_config.json names. `ids` are the special tokens and added words; what
    is none of theirs cannot be meant. Raises TokenizerError for a file that is damaged."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        listed = _setting(folder / name, "eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        if not all(id_ is None or type(id_) is int for id_ in listed):
            raise TokenizerError(f"{folder / name}: eos_token_id is {listed}; ids are integers")
        found.update(id_ for id_ in listed if id_ is not None and id_ >= 0)
    token = _setting(folder / TOKENIZER_CONFIG, "eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and token in ids:
        found.add(ids[token])
    return found


def _setting(path: Path, key: str) -> object:
    if not path.exists():
        return None
    try:
        return load_json(path.read_bytes()).get(key)
    except (TokenizerError, OSError) as error:
        raise TokenizerError(f"{path}: {error}") from error
