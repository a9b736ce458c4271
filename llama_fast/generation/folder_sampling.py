"""The sampling that a model's folder recommends."""

from __future__ import annotations

from pathlib import Path

from ..errors import PromptError
from ..tokenizer.files import json_beside
from .sampling import Sampling

FILE = "generation_config.json"


def folder_sampling(
    folder: str | Path,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Sampling:
    """Returns how tokens are drawn: what is given, else what the folder's generation_config.json
    says, else what `generate` does. Hugging Face's `do_sample: false` is temperature 0.

    Raises PromptError for values that cannot be, TokenizerError for a damaged file.
    """
    settings = json_beside(Path(folder) / FILE)
    if settings.get("do_sample") is False:
        settings["temperature"] = 0.0
    found = {
        name: settings[name]
        for name in ("temperature", "top_p", "top_k")
        if settings.get(name) is not None
    }
    try:
        defaults = Sampling(**found)
    except PromptError as error:
        raise PromptError(f"{Path(folder) / FILE}: {error}") from error
    return Sampling(
        defaults.temperature if temperature is None else temperature,
        defaults.top_p if top_p is None else top_p,
        defaults.top_k if top_k is None else top_k,
    )
