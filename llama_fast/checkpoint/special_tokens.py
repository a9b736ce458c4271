"""The special tokens that Hugging Face's settings name, as far as they are known here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import LlamaConfig
from ..tokenizer.special_tokens import ADDED_TOKENS, BOS, EOM, EOS, EOT, N_SPECIALS, special_ids
from .stored import read_json

_LLAMA3_BASE = 128000


def special_token_ids(config: LlamaConfig, tokenizer_files: Iterable[Path] = ()) -> dict[str, Any]:
    """bos_token_id and eos_token_id (a list: every token that stops) for config.json.

    The ordinary tokens are counted in tokenizer.model or read off tokenizer.json; without either
    they are Llama 3's 128,000 if the vocabulary is large enough. Both are None where nothing
    is known.
    """
    ids = _ids(config, {path.name: path for path in tokenizer_files})
    if ids is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {
        "bos_token_id": ids[BOS],
        "eos_token_id": [ids[name] for name in (EOS, EOM, EOT) if name in ids],
    }


def tokenizer_config(
    config: LlamaConfig, tokenizer_files: Iterable[Path] = ()
) -> dict[str, Any] | None:
    """What tokenizer_config.json says beside Meta's tokenizer.model, which lists no special tokens:
    those of Llama 3.0, or of 3.1 and later. None where there is no such file, or a tokenizer.json,
    which has its own."""
    files = {path.name: path for path in tokenizer_files}
    if "tokenizer.model" not in files or "tokenizer.json" in files:
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
    """The special tokens of the release that the config is of, where their place is known."""
    base = _base(config, files)
    if base is None or base + N_SPECIALS > config.vocab_size:
        return None
    return special_ids("3.0" if config.rope_scaling is None else "3.1", base)


def _base(config: LlamaConfig, files: dict[str, Path]) -> int | None:
    """How many ordinary tokens there are: the id of <|begin_of_text|>."""
    if "tokenizer.model" in files:
        lines = files["tokenizer.model"].read_bytes().splitlines()
        return sum(1 for line in lines if line.strip())
    if "tokenizer.json" in files:
        for token in read_json(files["tokenizer.json"]).get("added_tokens", []):
            if token.get("content") == "<|begin_of_text|>":
                return token.get("id")
        return None
    return _LLAMA3_BASE if config.vocab_size >= _LLAMA3_BASE + N_SPECIALS else None
