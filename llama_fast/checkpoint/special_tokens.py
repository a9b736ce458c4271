"""The special tokens that Hugging Face's settings name, as far as they are known here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import LlamaConfig
from ..tokenizer.files import listed_tokens, named_ends
from ..tokenizer.special_tokens import (
    ADDED_TOKENS,
    BOS,
    EOM,
    EOS,
    EOT,
    N_SPECIALS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    special_ids,
)
from .stored import read_json

_LLAMA3_BASE = 128000


def special_token_ids(config: LlamaConfig, tokenizer_files: Iterable[Path] = ()) -> dict[str, Any]:
    """bos_token_id and eos_token_id (a list: every token that stops) for config.json.

    tokenizer.json lists its tokens by their ids; with tokenizer.model alone they follow the
    ordinary ones that it holds; without either these are Llama 3's 128,000 if the vocabulary is
    large enough. Both are None where nothing is known.
    """
    files = {path.name: path for path in tokenizer_files}
    ids = _ids(config, files) or {}
    named: dict[str, str] = {}
    for settings in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        if settings in files:
            named |= named_ends(read_json(files[settings]))
    begin = next((ids[name] for name in (BOS, named.get("bos")) if name in ids), None)
    stops = dict.fromkeys(ids[n] for n in (EOS, EOM, EOT, named.get("eos")) if n in ids)
    return {"bos_token_id": begin, "eos_token_id": list(stops) or None}


def tokenizer_config(
    config: LlamaConfig, tokenizer_files: Iterable[Path] = ()
) -> dict[str, Any] | None:
    """What tokenizer_config.json says beside Meta's tokenizer.model, which lists no special tokens:
    those of Llama 3.0, or of 3.1 and later. None where there is no such file, where a
    tokenizer.json has its own, and where these settings are there already."""
    files = {path.name: path for path in tokenizer_files}
    if "tokenizer.model" not in files or files.keys() & {"tokenizer.json", TOKENIZER_CONFIG}:
        return None
    ids = _ids(config, files)
    if ids is None:
        return None
    alike = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        ADDED_TOKENS: {
            str(id_): {"content": name, **alike, "special": True} for name, id_ in ids.items()
        },
        "additional_special_tokens": [name for name in ids if name not in (BOS, EOS)],
        "bos_token": BOS,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _ids(config: LlamaConfig, files: dict[str, Path]) -> dict[str, int] | None:
    """The special tokens and added words that a tokenizer lists, or else those of the release that
    the config is of, where their place is known."""
    if "tokenizer.json" in files:
        added = read_json(files["tokenizer.json"]).get("added_tokens") or []
        return {token.get("content"): token.get("id") for token in added}
    if TOKENIZER_CONFIG in files:
        specials, added = listed_tokens(read_json(files[TOKENIZER_CONFIG]))
        if specials or added:
            return specials | added
    base = _LLAMA3_BASE
    if "tokenizer.model" in files:
        lines = files["tokenizer.model"].read_bytes().splitlines()
        base = sum(1 for line in lines if line.strip())
    if base + N_SPECIALS > config.vocab_size:
        return None
    return special_ids("3.0" if config.rope_scaling is None else "3.1", base)
