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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed.tensor_parallel import share_of, together
from ..model import Llama
from .grammar import Matcher, masked
from .sampling import Sampling, draw, logprobs

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


class Drawer:
    """Draws tokens from what an `Engine` gives, which is asked for `own_logits` as this says.

    known: how many ids, from 0 on, may be drawn
    """

    def __init__(self, model: Llama, known: int) -> None:
        self.known, self.dtype = known, model.dtype
        self.share = share_of(model) if together(model) else None
        self.own_logits = self.share is not None
        if self.share is not None:
            self.ranks = model.head.ranks
            self.start, stop = self.share.ranges["V"]
            self.own_known = max(0, min(known, stop) - self.start)

    def draw(
        self,
        logits: Tensor,
        matchers: Sequence[Matcher | None],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        """logits (B,V) float32, or this rank's → token ids (B,) int64, row b of what matchers[b]
        allows and with generators[b]; and their logprobs (B,) among all tokens that are known."""
        if self.share is not None:
            n, rows = candidates_of(sampling), self.share.rows_each
            if exchanged_bytes(n, rows, self.dtype) < rows * self.dtype.itemsize:
                drawn = self._draw_of_candidates(n, logits, matchers, sampling, generators)
                if drawn is not None:
                    return drawn
        logits = self.whole(logits)
        tokens = sampling.sample(masked(logits, matchers), generators)
        return tokens, logprobs(logits, tokens)

    def whole(self, logits: Tensor) -> Tensor:
        """The logits (B,V) of all tokens that are known."""
        if self.share is not None:
            logits = F.pad(logits, (0, self.share.rows_each - logits.shape[-1]))
            logits = self.ranks.gather(logits.to(self.dtype)).float()
            logits = logits[:, : self.share.whole.vocab_size]
        return logits[:, : self.known]

    def _draw_of_candidates(
        self,
        n: int,
        logits: Tensor,
        matchers: Sequence[Matcher | None],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor] | None:
        """As `draw`; None where `n` candidates are too few, and nothing has been drawn."""
        logits = logits[:, : self.own_known]
        allowed = masked(logits, matchers, self.start)
        keys = likeliest(allowed, n, self.start)
        sums = (
            logits.double().logsumexp(-1, keepdim=True),
            # Counted from the largest: else a small temperature leaves nothing of their number.
            ((allowed - _largest(keys)) / sampling.divisor).logsumexp(-1, keepdim=True),
        )
        given = torch.cat((keys, *(x.view(torch.int64) for x in sums)), -1)
        of_ranks = self.ranks.gather(given).unflatten(-1, (-1, n + 2))  # (B, ranks, n + 2)

        sums, divided = of_ranks[..., n:].contiguous().view(torch.float64).split(1, -1)
        whole, largest_each = sums.logsumexp(1), _largest(of_ranks)  # (B, 1), (B, ranks, 1)
        largest = largest_each.amax(1)
        divided += (largest_each - largest.unsqueeze(1)) / sampling.divisor
        keys, floor = of_ranks[..., :n], of_ranks[..., n - 1].amax(-1, keepdim=True)
        keys = keys.flatten(1).sort(-1, descending=True).values
        values, ids = logits_and_ids(keys)
        if sampling.greedy:
            position = torch.zeros_like(ids[:, :1])
        else:
            p = ((values - largest) / sampling.divisor - divided.logsumexp(1)).exp()
            certain = (p * (keys >= floor)).sum(-1)
            if not sampling.top_k and not (certain > sampling.top_p).all():
                return None
            position = draw(sampling.keep(p.float(), torch.ones_like(whole)), generators)
        scores = values.double().gather(-1, position) - whole
        return ids.gather(-1, position).squeeze(-1), scores.squeeze(-1).float()


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
