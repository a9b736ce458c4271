"""Which chat format a model's folder asks for."""

from __future__ import annotations

from pathlib import Path

from ..errors import TokenizerError
from ..utils.files import given_path
from .chat import ChatFormat
from .chat_prompts import DATE
from .chat_template import TemplateFormat, folder_templates
from .files import json_beside
from .special_tokens import EOM
from .tokenizer import Tokenizer


def chat_format(
    folder: str | Path, tokenizer: Tokenizer | None = None, *, date: str = DATE
) -> ChatFormat | TemplateFormat:
    """Returns the format of a folder: its own chat template, or else the form and the release that
    its settings tell of. `describe()` of the result says which.

    A params.json means Meta's form, a config.json alone Hugging Face's. The release is 3.0 where
    positions are not scaled; 3.2 where they are and the model is of the size of 3.2 (Meta), or
    scaled 32 times (Hugging Face); else 3.1, whose format 3.3's is too. Raises TokenizerError for
    damaged files, PromptError for a template or a vocabulary that cannot serve.
    """
    folder = given_path(folder, "the folder of a model", TokenizerError)
    tokenizer = tokenizer or Tokenizer.from_pretrained(folder)
    if folder_templates(folder):
        return TemplateFormat.from_pretrained(folder, tokenizer, date=date)
    params, config = json_beside(folder / "params.json"), json_beside(folder / "config.json")
    if params:
        scaled = bool(params.get("use_scaled_rope"))
        small = params.get("dim") in (2048, 3072)
    else:
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        scaled, small = factor is not None, factor == 32
    if not params and not config:
        return ChatFormat.for_tokenizer(tokenizer, date=date)
    release = "3.0" if not scaled or EOM not in tokenizer.specials else "3.2" if small else "3.1"
    return ChatFormat(tokenizer, release, form="meta" if params else "hf", date=date)
