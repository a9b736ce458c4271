"""Draws tokens from logits; of a model over ranks from candidates that each rank gives.

To gather the logits of 128,256 tokens in every step is to send them all, and to sort them on every
rank. A draw needs far less: the likeliest tokens, and what the exponents of all add up to. So a
rank gives its `n` likeliest and two sums of its own. The n-th of the rank whose n-th is likeliest
is the floor: what no rank has given lies below it. Where top_p keeps more than lies above the
floor, or where neither top_p nor top_k leaves anything out, the logits are gathered after all. All
ranks see the same numbers, so they decide alike, and draw the same from the same seeds.

A candidate is one integer of 64 bits, the larger the likelier: the bits of its logit, in the order
of the numbers, and below them its id counted down, so that equal logits come in the order of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed.tensor_parallel import share_of
from ..model import Llama
from .grammar import masked
from .sampling import Sampling, draw, logprobs, rows_of_each, sample_each

# Candidates of a rank where top_p alone says how many are kept: 2 kB of each rank.
NUCLEUS = 256
LOW_BITS = 2**32 - 1


def candidates_of(sampling: Sampling) -> int:
    """Returns how many candidates of each rank a draw needs; 0 where it needs all logits."""
    if sampling.greedy:
        return 1
    return sampling.top_k or (NUCLEUS if sampling.top_p < 1 else 0)


def exchanged_bytes(n: int, rows: int, dtype: torch.dtype) -> int:
    """Returns what a rank with `rows` rows of the vocabulary gives for each text: `n` candidates
    and two sums; or its logits, where n is 0 or they are less."""
    logits = rows * dtype.itemsize
    return min(logits, (n + 2) * torch.int64.itemsize) if n else logits


class Drawn(NamedTuple):
    """A token of each row. Logprobs are those among all tokens that are known.

    tokens    (B,) int64
    logprobs  (B,) float32
    top       ids and logprobs of the likeliest tokens, (B,m) each, likeliest first
    """

    tokens: Tensor
    logprobs: Tensor
    top: tuple[Tensor, Tensor] | None = None


class Drawer:
    """Draws tokens from what an engine gives (`follow.acquire`): the logits of all tokens, or of a
    model over ranks this rank's.

    known: how many ids, from 0 on, may be drawn
    """

    def __init__(self, model: Llama, known: int) -> None:
        self.known = known
        self.part = None if share_of(model) is None else Part(model, known)

    def draw(
        self,
        logits: Tensor,
        allowed: Sequence[np.ndarray | None],
        samplings: Sequence[Sampling],
        generators: Sequence[torch.Generator],
        *,
        rows: Sequence[int] | None = None,
        top: int = 0,
    ) -> Drawn:
        """logits (N,V) float32, or this rank's → a token of each of B rows: `rows` of the logits,
        by default all. That of row b is one that allowed[b] says (`grammar.allowed_by`), drawn as
        samplings[b] says, with generators[b].

        top  tells also the so many likeliest tokens of each row, whatever is allowed
        """
        if self.part is not None:
            needed = [candidates_of(sampling) for sampling in samplings]
            n = max(*needed, top) if all(needed) else 0
            if self.part.gives_less(n) and self._all_know(allowed):
                drawn = self._draw_of_candidates(
                    n, logits, allowed, samplings, generators, rows, top
                )
                if drawn is not None:
                    return drawn
        logits = self.whole(logits, rows)
        tokens = sample_each(masked(logits, allowed), samplings, generators)
        best = None
        if top:
            values, ids = logits.log_softmax(-1).topk(min(top, logits.shape[-1]))
            best = ids, values
        return Drawn(tokens, logprobs(logits, tokens), best)

    def whole(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """The logits (B,V) of all tokens that are known."""
        if self.part is not None:
            return self._exchange("whole", logits, rows)
        return rows_of(logits, rows)[:, : self.known]

    def _all_know(self, allowed: Sequence[np.ndarray | None]) -> bool:
        """Whether each rank knows what is allowed: those that follow are not told of grammars."""
        return self.part.head.leader is None or all(tokens is None for tokens in allowed)

    def _exchange(
        self, name: str, logits: Tensor, rows: Sequence[int] | None, *args: Any, **own: Any
    ) -> Tensor:
        """What all ranks make of their parts; where this one leads, the others are told to."""
        if self.part.head.leader is not None:
            self.part.head.leader.say(name, self.known, rows, *args)
        return getattr(self.part, name)(logits, rows, *args, **own)

    def _draw_of_candidates(
        self,
        n: int,
        logits: Tensor,
        allowed: Sequence[np.ndarray | None],
        samplings: Sequence[Sampling],
        generators: Sequence[torch.Generator],
        rows: Sequence[int] | None,
        top: int,
    ) -> Drawn | None:
        """As `draw`; None where `n` candidates are too few, and nothing has been drawn."""
        divisors = [[sampling.divisor] for sampling in samplings]
        asked = [] if all(sampling.greedy for sampling in samplings) else divisors
        of_ranks = self._exchange("candidates", logits, rows, n, asked, allowed=allowed)
        divisors = of_divisors(divisors, logits)

        sums, divided = of_ranks[..., n:].contiguous().view(torch.float64).split(1, -1)
        whole, largest_each = sums.logsumexp(1), _largest(of_ranks)  # (B, 1), (B, ranks, 1)
        largest = largest_each.amax(1)
        divided += (largest_each - largest.unsqueeze(1)) / divisors.unsqueeze(1)
        keys, floor = of_ranks[..., :n], of_ranks[..., n - 1].amax(-1, keepdim=True)
        keys = keys.flatten(1).sort(-1, descending=True).values
        values, ids = logits_and_ids(keys)
        p = ((values - largest) / divisors - divided.logsumexp(1)).exp()
        certain = (p * (keys >= floor)).sum(-1).tolist()
        if not all(
            sampling.greedy or sampling.top_k or certain[row] > sampling.top_p
            for row, sampling in enumerate(samplings)
        ):
            return None
        position = torch.zeros_like(ids[:, :1])
        for sampling, alike in rows_of_each(samplings).items():
            if not sampling.greedy:
                kept = sampling.keep(p[alike].float(), torch.ones_like(whole[alike]))
                position[alike] = draw(kept, [generators[row] for row in alike])
        scores = (values - whole).float()
        return Drawn(
            ids.gather(-1, position).squeeze(-1),
            scores.gather(-1, position).squeeze(-1),
            (ids[:, :top], scores[:, :top]) if top else None,
        )


class Part:
    """What a rank has of the logits, and what the ranks make of their parts together."""

    def __init__(self, model: Llama, known: int) -> None:
        self.head, self.known, self.dtype = model.head, known, model.dtype
        self.share = self.head.share
        self.start, stop = self.share.ranges["V"]
        self.own_known = max(0, min(known, stop) - self.start)

    def gives_less(self, n: int) -> bool:
        """Whether `n` candidates are less to exchange than the logits."""
        rows = self.share.rows_each
        return exchanged_bytes(n, rows, self.dtype) < rows * self.dtype.itemsize

    def candidates(
        self,
        logits: Tensor,
        rows: Sequence[int] | None,
        n: int,
        divisors: list[list[float]],
        allowed: Sequence[np.ndarray | None] = (),
    ) -> Tensor:
        """This rank's logits (N,R), of which `rows` are drawn → `n` candidates of each rank and its
        two sums, (B, ranks, n + 2) int64, the sums as the bits of float64. Without `divisors` the
        second sum is of nothing."""
        logits = rows_of(logits, rows)[:, : self.own_known]
        within = masked(logits, allowed, self.start)
        keys = likeliest(within, n, self.start)
        # Counted from the largest: else a small temperature leaves nothing of their number.
        largest = _largest(keys)
        divided = (within - largest) / of_divisors(divisors, logits) if divisors else largest * 0
        sums = (x.logsumexp(-1, keepdim=True) for x in (logits.double(), divided))
        given = torch.cat((keys, *(x.view(torch.int64) for x in sums)), -1)
        return self.head.ranks.gather(given).unflatten(-1, (-1, n + 2))

    def whole(self, logits: Tensor, rows: Sequence[int] | None) -> Tensor:
        """This rank's logits (N,R), of which `rows` are wanted → those of all tokens that are
        known, (B,V)."""
        logits = rows_of(logits, rows)
        logits = F.pad(logits, (0, self.share.rows_each - logits.shape[-1]))
        logits = self.head.ranks.gather(logits.to(self.dtype)).float()
        return logits[:, : min(self.known, self.share.whole.vocab_size)]


def rows_of(logits: Tensor, rows: Sequence[int] | None) -> Tensor:
    return logits if rows is None else logits[torch.tensor(rows, device=logits.device)]


def of_divisors(divisors: list[list[float]], logits: Tensor) -> Tensor:
    return torch.tensor(divisors, dtype=torch.float64, device=logits.device)


def likeliest(logits: Tensor, n: int, start: int) -> Tensor:
    """The `n` likeliest tokens of logits (B,R) float32, whose ids begin at `start`, likeliest
    first: (B,n) int64, see above. Where there are fewer, the last ones have the logit -inf."""
    logits = F.pad(logits, (0, max(0, n - logits.shape[-1])), value=-torch.inf)
    bits = (logits + 0.0).view(torch.int32)  # -0.0 is 0.0
    ids = torch.arange(start, start + logits.shape[-1], device=logits.device)
    return (_in_order(bits).long() << 32 | (LOW_BITS - ids)).topk(n).values


def logits_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `likeliest` has made keys of."""
    return _in_order((keys >> 32).int()).view(torch.float32), LOW_BITS - (keys & LOW_BITS)


def _largest(keys: Tensor) -> Tensor:
    """The logit (…,1) float64 of the likeliest token, which is the first; a finite one where it is
    -inf, since differences to it are asked for."""
    return logits_and_ids(keys[..., :1])[0].double().clamp(min=torch.finfo(torch.float32).min)


def _in_order(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of the floats; and back again."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)
