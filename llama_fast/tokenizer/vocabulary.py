"""A vocabulary made longer or shorter, without torch: new tokens from a corpus, or those of a
corpus alone.

- `extend` goes on with the training of the BPE. Ids of the old vocabulary do not change, and the
  new encoding of any text only joins tokens of the old one.
- `prune` keeps the tokens that a corpus needs, and numbers them anew.

What rows of a model follow: `checkpoint.vocabulary`, `training.vocabulary`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..errors import TokenizerError
from .bpe import Progress, Trainer, merge
from .corpus import count_pieces, words
from .tokenizer import Tokenizer

_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


def extend(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    n: int,
    *,
    min_count: int = 2,
    max_chars: int | None = None,
    scripts: Collection[str] = (),
    use_reserved: bool = False,
    progress: Progress | None = None,
) -> Tokenizer:
    """Returns the vocabulary with `n` tokens more, learnt from texts, which are gone through once.

    The new tokens follow the last id, special tokens included; with use_reserved they first take
    the ids of the <|reserved_special_token_N|>, which leave the vocabulary. min_count: how often
    the pair that becomes a token must occur. max_chars: how many characters a new token may have;
    where the corpus repeats whole clauses, as templates do, these would become tokens that no other
    text contains. scripts: names of Unicode scripts ("Han"), of whose characters alone new tokens
    are made. progress(done, n) is called after each. The same texts in the same order give the same
    tokens; up to `corpus.MAX_PIECES` distinct pieces the order is of no matter.

    Raises TokenizerError where the texts are empty or hold too few pairs for so many tokens.
    """
    if isinstance(texts, str):
        raise TokenizerError("extend takes several texts, not one str; give [text]")
    longest = 1 if max_chars is None else max_chars
    for name, value, least in (
        ("n", n, 1), ("min_count", min_count, 1), ("max_chars", longest, 1)
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise TokenizerError(f"{name} is {value!r}; give a whole number from {least} on")
    places = _reserved(tokenizer) if use_reserved else []
    found = count_pieces(texts, tokenizer)
    if not found:
        raise TokenizerError("the corpus has no text; give texts in the language to be learnt")
    trainer = Trainer(words(found, tokenizer, scripts), tokenizer.ranks)
    if not trainer.parts:
        where = f" with characters of {', '.join(scripts)}" if scripts else ""
        raise TokenizerError(
            f"the corpus has no piece of two tokens or more{where}; there is nothing to join"
        )
    del found
    trainer.train(n, progress, min_count=min_count, max_chars=max_chars)
    if len(trainer.new) < n:
        raise TokenizerError(
            f"the corpus gives {len(trainer.new)} new tokens whose pair occurs {min_count} times "
            f"or more, not {n}: ask for fewer, give more text, or take rarer pairs (min_count, "
            "--min-count)"
        )
    names = set(places[:n])
    specials = {name: id_ for name, id_ in tokenizer.specials.items() if name not in names}
    ids = [tokenizer.specials[name] for name in places[:n]]
    ids += range(tokenizer.vocab_size, tokenizer.vocab_size + n - len(ids))
    tokens = _tokens_by_id(tokenizer) + [None] * (n - len(names))
    for id_, token in zip(ids, trainer.new, strict=True):
        tokens[id_] = token
    return _like(tokenizer, tokens, specials, tokenizer.added)


def tokens_after_specials(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that follow the special ones, or stand in the place of reserved
    ones: those that `extend` has made."""
    return sorted(id_ for id_ in tokenizer.ranks.values() if id_ >= tokenizer.n_ranks)


def _reserved(tokenizer: Tokenizer) -> list[str]:
    """The reserved special tokens, by their ids. Raises where tokens follow them already."""
    named = sorted((id_, name) for name, id_ in tokenizer.specials.items())
    found = [name for _, name in named if _RESERVED.fullmatch(name)]
    if not found:
        raise TokenizerError(
            "use_reserved: this vocabulary has no <|reserved_special_token_N|>; leave it out"
        )
    if tokenizer.specials[found[0]] < max(tokenizer.ranks.values()):
        raise TokenizerError(
            "use_reserved: this vocabulary was extended already, and a new token must come after "
            "all others; leave it out"
        )
    return found


def _tokens_by_id(tokenizer: Tokenizer) -> list[bytes | None]:
    tokens: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, rank in tokenizer.ranks.items():
        tokens[rank] = token
    return tokens


def _like(
    old: Tokenizer, tokens: list[bytes | None], specials: dict[str, int], added: dict[str, int]
) -> Tokenizer:
    """A vocabulary whose texts begin and end as the old one's do."""
    while tokens and tokens[-1] is None:
        tokens.pop()
    new = Tokenizer(
        tokens,
        specials=specials,
        added=added,
        bos=old.name(old.bos_id),
        eos=old.name(old.eos_id),
    )
    old_ends = {old.name(id_) for id_ in old.stop_ids}
    named = new.specials | new.added
    new.stop_ids |= {named[name] for name in old_ends if name in named}
    return new


# --- what a longer vocabulary has more than a shorter one ---------------------------------------


def new_tokens(longer: Tokenizer, old: Tokenizer) -> dict[int, list[int]]:
    """Returns the ids of the tokens that `longer` has beyond `old`, each with the ids of the old
    tokens that spell it.

    Raises TokenizerError where `longer` is no extension of `old`: an id means something else, or is
    gone. Reserved special tokens alone may have given their ids away.
    """
    found: dict[int, list[int]] = {}
    longer_words = {id_: name for name, id_ in (longer.specials | longer.added).items()}
    old_words = {id_: name for name, id_ in (old.specials | old.added).items()}
    by_rank = {rank: token for token, rank in longer.ranks.items()}
    old_by_rank = {rank: token for token, rank in old.ranks.items()}
    for id_ in range(max(longer.vocab_size, old.vocab_size)):
        token, word = by_rank.get(id_), longer_words.get(id_)
        before, word_before = old_by_rank.get(id_), old_words.get(id_)
        if (token, word) == (before, word_before):
            continue
        given_away = before is None and word_before and _RESERVED.fullmatch(word_before)
        if word is not None or token is None or (id_ < old.vocab_size and not given_away):
            shown = "nothing" if id_ >= longer.vocab_size else repr(longer.id_to_bytes[id_])
            theirs = "nothing" if id_ >= old.vocab_size else repr(old.id_to_bytes[id_])
            raise TokenizerError(
                f"the vocabulary is no extension of the model's: id {id_} is {shown} in it, and "
                f"{theirs} in the model's. Give one that was made from this model's (vocab train "
                "--base MODEL)"
            )
        found[id_] = [old.ranks[part] for part in merge(token, old.ranks)[0]]
    if not found:
        raise TokenizerError(
            "the vocabulary has no token that the model's has not; there is nothing to extend"
        )
    return found


# --- fewer tokens -------------------------------------------------------------------------------


class Pruned(NamedTuple):
    """A shorter vocabulary, and the old id of each of its ids, which rise."""

    tokenizer: Tokenizer
    kept: list[int]

    def new_ids(self) -> dict[int, int]:
        """Returns the new id of each old id that was kept."""
        return {old: new for new, old in enumerate(self.kept)}


def prune(tokenizer: Tokenizer, texts: Iterable[str], *, min_count: int = 1) -> Pruned:
    """Returns the vocabulary of the tokens that texts need: those that occur in them `min_count`
    times, those on the way to them when they are merged, the 256 single bytes, and all special
    tokens and added words. Texts whose tokens are all kept have the same tokens as before.

    Raises TokenizerError for texts that are empty.
    """
    if isinstance(texts, str):
        raise TokenizerError("prune takes several texts, not one str; give [text]")
    found = count_pieces(texts, tokenizer)
    if not found:
        raise TokenizerError("the corpus has no text; give the texts that the model is to serve")
    used: dict[int, int] = {}
    for piece, count in found.items():
        for id_ in tokenizer.encode_words(piece, {}):
            used[id_] = used.get(id_, 0) + count
    ranks = tokenizer.ranks
    keep = {rank for token, rank in ranks.items() if len(token) == 1}
    for id_, count in used.items():
        if count >= min_count:
            keep.add(id_)
            parts, made = merge(tokenizer.id_to_bytes[id_], ranks)
            if len(parts) == 1:  # a token that merging cannot reach is taken whole, and needs none
                keep.update(ranks[token] for token in made)
    named = tokenizer.specials | tokenizer.added
    kept = sorted(keep | set(named.values()))
    new = {old: n for n, old in enumerate(kept)}
    tokens: list[bytes | None] = [None] * len(kept)
    for token, rank in ranks.items():
        if rank in new:
            tokens[new[rank]] = token
    specials = {name: new[id_] for name, id_ in tokenizer.specials.items()}
    added = {name: new[id_] for name, id_ in tokenizer.added.items()}
    return Pruned(_like(tokenizer, tokens, specials, added), kept)
