"""New rows of an embedding, trained so that a text's new spelling gives the old hidden states.

The teacher is the model itself with the old tokens, so that nothing but texts is needed. Where a
new token ends, an old one ends too, since new tokens only join old ones; there the two hidden
states after the last norm are compared:

    loss = mean over those places of (hidden(new spelling) - hidden(old spelling))²

Only the new tokens' input rows change. After "Token Distillation: Attention-Aware Input Embeddings
for New Tokens" (Dobler, Elliott and de Melo, 2025): MSE, learning rate 1e-4, snippets of some 50
tokens.

Legend of dims: B snippets of a batch, T tokens of a snippet, C model dim.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..model import Llama
from ..tokenizer import Tokenizer
from ..tokenizer.vocabulary import new_tokens

Progress = Callable[[int, int, float], None]


class Snippet(NamedTuple):
    """A text in both spellings: new ids, old ids, and pairs (place in the new ones, place in the
    old ones) where tokens end together, from the first new token on."""

    new: list[int]
    old: list[int]
    places: list[tuple[int, int]]


class Distilled(NamedTuple):
    """What came of it: the loss of the first and of the last tenth of the batches, how many new
    tokens occurred in the texts (the others keep their rows), and how many batches there were."""

    first: float
    last: float
    seen: int
    steps: int


def distill(
    model: Llama,
    old: Tokenizer,
    longer: Tokenizer,
    texts: Iterable[str],
    *,
    snippets: int = 100,
    length: int = 50,
    batch: int = 16,
    lr: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Distilled:
    """Trains the input rows of the tokens that `longer` has beyond `old`. The model has rows for
    them already (`vocabulary.resize`), from which the training begins.

    snippets: at most so many for each new token, of `length` new tokens. batch: snippets a step.
    lr: of Adam, in float32 whatever the weights' dtype. progress(done, steps, loss) is called after
    each step. A tied head gets the same rows. Raises DataError for texts that hold no new token.
    """
    for name, value in (("snippets", snippets), ("length", length), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; give a whole number from 1 on")
    new = new_tokens(longer, old)
    found, seen = _snippets(texts, old, longer, new.keys(), snippets, length, model)
    if not found:
        raise DataError(
            "the texts hold no new token; give the corpus from which the vocabulary was made"
        )
    random.Random(seed).shuffle(found)
    # Of like lengths, so that little is padded; the batches then in any order.
    found.sort(key=lambda snippet: len(snippet.old) // 16)
    batches = [found[at : at + batch] for at in range(0, len(found), batch)]
    random.Random(seed + 1).shuffle(batches)
    ids = torch.tensor(list(new), device=model.device)
    weight = model.embed.weight
    rows = weight.detach()[ids].float().clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=lr)
    losses = []
    for done, group in enumerate(batches, 1):
        with torch.no_grad():
            goal = _hidden(model, [s.old for s in group], [[o for _, o in s.places] for s in group])
        with torch.enable_grad(), _rows_of(model, ids, rows):
            got = _hidden(model, [s.new for s in group], [[n for n, _ in s.places] for s in group])
            loss = (got.float() - goal.float()).square().mean()
        (rows.grad,) = torch.autograd.grad(loss, [rows])
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(done, len(batches), losses[-1])
    with torch.no_grad():
        weight[ids] = rows.to(weight.dtype)
    part = max(1, len(losses) // 10)
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    return Distilled(first, last, seen, len(batches))


def _snippets(
    texts: Iterable[str],
    old: Tokenizer,
    longer: Tokenizer,
    new: Iterable[int],
    most: int,
    length: int,
    model: Llama,
) -> tuple[list[Snippet], int]:
    """Snippets until each new token has `most` of them or the texts end; and how many occur."""
    wanted, count = set(new), Counter()
    found: list[Snippet] = []
    longest = model.config.max_seq_len
    for text in texts:
        after, before = longer.encode(text), old.encode(text)
        ends = {end: at for at, end in enumerate(_ends(old, before))}
        after_ends = _ends(longer, after)
        for start in range(0, len(after), length):
            stop = min(start + length, len(after))
            fresh = {id_ for id_ in after[start:stop] if id_ in wanted}
            if not any(count[id_] < most for id_ in fresh):
                continue
            first = 0 if start == 0 else ends[after_ends[start - 1]] + 1
            last = ends[after_ends[stop - 1]] + 1
            last = min(last, first + longest - 1)  # a begin token may come before
            begin = next(at for at in range(start, stop) if after[at] in wanted)
            places = [
                (at - start, ends[after_ends[at]] - first)
                for at in range(begin, stop)
                if ends[after_ends[at]] < last
            ]
            if not places:
                continue
            bos = [] if longer.bos_id is None else [longer.bos_id]
            shift = len(bos)
            found.append(
                Snippet(
                    bos + after[start : start + places[-1][0] + 1],
                    bos + before[first:last],
                    [(n + shift, o + shift) for n, o in places],
                )
            )
            count.update(fresh)
    return found, sum(count[id_] > 0 for id_ in wanted)


def _ends(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The byte after each token."""
    return list(accumulate(len(tokenizer.id_to_bytes[id_]) for id_ in ids))


def _hidden(model: Llama, rows: list[list[int]], places: list[list[int]]) -> Tensor:
    """The final hidden states (n,C) at the places of each row, one row's behind another's. Rows are
    padded at their ends, which nothing before them sees."""
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=model.device)
    h = model.hidden(tokens)
    row = torch.tensor([n for n, some in enumerate(places) for _ in some], device=model.device)
    at = torch.tensor([place for some in places for place in some], device=model.device)
    return h[row, at]


@contextmanager
def _rows_of(model: Llama, ids: Tensor, rows: Tensor) -> Iterator[None]:
    """Within it the embedding looks these ids up in `rows` (n,C), which alone ask for gradients."""
    place = torch.full((model.config.vocab_size,), -1, device=model.device)
    place[ids] = torch.arange(len(ids), device=model.device)

    def look_up(module: torch.nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        at = place[given[0]]
        fresh = rows[at.clamp(min=0)].to(out.dtype)
        return torch.where((at >= 0)[..., None], fresh, out.detach())

    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    handle = model.embed.register_forward_hook(look_up)
    try:
        yield
    finally:
        handle.remove()
        for parameter in asked:
            parameter.requires_grad_(True)
