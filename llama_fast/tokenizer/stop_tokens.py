"""The tokens that a checkpoint's folder says end a text, besides Llama 3's own: fine-tunes list an
added word there, such as `<|im_end|>`."""

from __future__ import annotations

from pathlib import Path

from ..errors import TokenizerError
from .files import json_beside


def folder_stop_ids(folder: Path) -> set[int]:
    """Returns those that `eos_token_id` of config.json and generation_config.json lists. Raises
    TokenizerError for a file that is damaged."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        listed = json_beside(folder / name).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        if not all(id_ is None or type(id_) is int for id_ in listed):
            raise TokenizerError(f"{folder / name}: eos_token_id is {listed}; ids are integers")
        found.update(id_ for id_ in listed if id_ is not None and id_ >= 0)
    return found
