"""The published Llama 3 models, and the names that people call them."""

from __future__ import annotations

import re
from typing import Any

from .rope_scaling import RopeScaling


def _llama3(
    dim: int, n_layers: int, n_heads: int, head_dim: int, hidden_dim: int, **more: Any
) -> dict[str, Any]:
    return {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "head_dim": head_dim,
        "hidden_dim": hidden_dim,
        "vocab_size": 128256,
        **more,
    }


_SCALED_8 = {"rope_scaling": RopeScaling(8.0), "max_seq_len": 131072}
_SCALED_32 = {"rope_scaling": RopeScaling(32.0), "max_seq_len": 131072}

# The arguments of `LlamaConfig`.
SIZES: dict[str, dict[str, Any]] = {
    "1b": _llama3(2048, 16, 32, 64, 8192, tied=True, **_SCALED_32),
    "3b": _llama3(3072, 28, 24, 128, 8192, tied=True, **_SCALED_32),
    "8b": _llama3(4096, 32, 32, 128, 14336),
    "8b-3.1": _llama3(4096, 32, 32, 128, 14336, **_SCALED_8),
    "70b": _llama3(8192, 80, 64, 128, 28672),
    "70b-3.1": _llama3(8192, 80, 64, 128, 28672, **_SCALED_8),
    "405b": _llama3(16384, 126, 128, 128, 53248, **_SCALED_8),
}

# Releases whose name differs from their row's: size and version → row.
_SAME_SHAPE = {
    "1b-3.2": "1b",
    "3b-3.2": "3b",
    "8b-3": "8b",
    "70b-3": "70b",
    "70b-3.3": "70b-3.1",
    "405b-3.1": "405b",
}


def preset_key(name: str) -> str:
    """The row of SIZES that a name means, in whatever order it gives version and size."""
    text = re.sub(r"^meta-|-instruct$", "", name.strip().lower().replace("_", "-"))
    text = re.sub(r"^llama-?", "", text)
    match = re.fullmatch(r"(?:(3(?:\.\d)?)-)?(\d+b)(?:-(3(?:\.\d)?))?", text)
    if not match or (match[1] and match[3]):
        return text
    version = (match[1] or match[3] or "").removesuffix(".0")
    key = f"{match[2]}-{version}" if version else match[2]
    return _SAME_SHAPE.get(key, key)
