"""Another vocabulary for a model in memory, and its whole workflow in one module:

    from llama_fast.training import vocabulary

    longer = vocabulary.extend(tokenizer, texts, 5000)      # a Tokenizer
    new_ids = vocabulary.resize(model, longer, old=tokenizer)   # rows for it, in place
    shorter, kept = vocabulary.prune(tokenizer, texts)

For folders, which need not fit into memory: `checkpoint.vocabulary`. Facts: docs/vocabulary.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..checkpoint.names import EMBED, HEAD
from ..checkpoint.vocabulary import (
    MULTIPLE,
    check_fits,
    extend_folder,
    extended_rows,
    padded_config,
    prune_folder,
)
from ..errors import ConfigError, TokenizerError
from ..model import Llama
from ..tokenizer import Tokenizer
from ..tokenizer.vocabulary import (
    Pruned,
    extend,
    new_tokens,
    prune,
    tokens_after_specials,
)
from .distill import distill

__all__ = [
    "Pruned",
    "distill",
    "extend",
    "extend_folder",
    "new_tokens",
    "prune",
    "prune_folder",
    "resize",
]


def resize(
    model: Llama,
    longer: Tokenizer,
    init: str = "mean",
    *,
    old: Tokenizer | None = None,
    texts: Iterable[str] | None = None,
    multiple: int = MULTIPLE,
) -> list[int]:
    """Gives the model rows for a longer vocabulary, in place, and returns the new ids.

    init "mean": a new row is the mean of those of the old tokens that spell it, in the embedding
    and in the head apart. "distill": then the new input rows are trained on `texts`, so that the
    hidden states are those of the old spelling (`distill`). Old rows stay bit-equal; a tied head
    stays tied. old: the vocabulary that the model has; None where `longer` was extended once,
    without reserved tokens: then it is what comes before the first new token. multiple: rows are
    padded to one of it, and the padding's logits are masked (`config.vocab_padding`).

    Raises TokenizerError for a vocabulary that is no extension of the model's, ConfigError for a
    quantised model, for another `init`, and for "distill" without texts; the model is then as it
    was. Raises DataError for texts that hold no new token; the rows are then means.
    """
    if init not in ("mean", "distill"):
        raise ConfigError(f'init is {init!r}; it must be "mean" or "distill"')
    if (texts is not None) != (init == "distill"):
        raise ConfigError(
            'init="distill" needs texts, which hold the new tokens; init="mean" needs none'
        )
    weights = {
        name: model.get_submodule(name.removesuffix(".weight")).weight for name in _names(model)
    }
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ConfigError(
            "the model is quantised; resize the model of floats, and quantise the result"
        )
    if old is None:
        old = _before_the_extension(longer, model)
    check_fits(old, model.config, "the model")
    new = new_tokens(longer, old)
    config = padded_config(model.config, longer.vocab_size, multiple)
    with torch.no_grad():
        made = {
            name: extended_rows(weight, new, old.vocab_size, config.vocab_size)
            for name, weight in weights.items()
        }
    asks_gradient = {name: weight.requires_grad for name, weight in weights.items()}
    for name, rows in made.items():
        model.set_weight(name, rows)
        model.get_submodule(name.removesuffix(".weight")).weight.requires_grad_(asks_gradient[name])
    model.config = config
    model.tie()
    if init == "distill":
        distill(model, old, longer, texts)
    return list(new)


def _names(model: Llama) -> tuple[str, ...]:
    return (EMBED,) if model.config.tied else (EMBED, HEAD)


def _before_the_extension(longer: Tokenizer, model: Llama) -> Tokenizer:
    """The vocabulary of all that comes before the first token after the special ones. Raises where
    the model has rows for more: it was extended before."""
    words = longer.specials | longer.added
    first = min(tokens_after_specials(longer), default=longer.vocab_size)
    tokens = list(longer.id_to_bytes[: longer.n_ranks])
    if model.config.vocab_size - model.config.vocab_padding > first:
        raise TokenizerError(
            f"the first token after the special ones has the id {first}, and the model has "
            f"{model.config.vocab_size} rows: say which vocabulary it has: resize(…, old=tokenizer)"
        )
    specials = {name: id_ for name, id_ in longer.specials.items() if id_ < first}
    added = {name: id_ for name, id_ in longer.added.items() if id_ < first}
    if len(specials) + len(added) < len(words):
        raise TokenizerError(
            "special tokens or added words stand among the new tokens; say which vocabulary the "
            "model has: resize(…, old=tokenizer)"
        )
    return Tokenizer(
        tokens,
        specials=specials,
        added=added,
        bos=longer.name(longer.bos_id),
        eos=longer.name(longer.eos_id),
    )
