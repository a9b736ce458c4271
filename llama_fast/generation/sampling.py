"""From logits to a token: temperature, top-k, top-p, and a random number per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PromptError
from .arguments import number, whole_number

# Other temperatures have no place in float32; smaller ones are the limit, which is greedy.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
LARGEST_TEMPERATURE = torch.finfo(torch.float32).max
# Parts of the largest probability: below the first, or the second, top_p often keeps no token.
CUTS = (2**-8, 2**-14)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    temperature  0 takes the likeliest token; otherwise logits are divided by it
    top_k        keep the k likeliest tokens; 0 keeps all
    top_p        keep the likeliest tokens until their probability passes p, the one that passes it
                 included; 1 keeps all
    Raises PromptError for values outside these meanings.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0

    def __post_init__(self) -> None:
        temperature, top_p = number(self.temperature, "temperature"), number(self.top_p, "top_p")
        if not 0 <= temperature < math.inf:
            raise PromptError(f"temperature is {temperature}; it must be 0 or more, and finite")
        if not 0 < top_p <= 1:
            raise PromptError(f"top_p is {top_p}; it must be above 0 and at most 1")
        top_k = whole_number(self.top_k, "top_k", 0, " (off)")
        # In numbers of Python's own, whatever was given.
        for name, value in ("temperature", temperature), ("top_p", top_p), ("top_k", top_k):
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < SMALLEST_TEMPERATURE

    @property
    def divisor(self) -> float:
        """The temperature, as far as it has a place in float32."""
        return min(max(self.temperature, SMALLEST_TEMPERATURE), LARGEST_TEMPERATURE)

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B,V) float32 → (probabilities, token ids), likeliest first: each (B,V), or fewer
        where all others have probability 0.

        Equal probabilities come in the order of their ids, so a draw is reproducible.
        """
        # Counted from the largest, they are finite or -inf at any temperature.
        logits = logits - logits.amax(-1, keepdim=True)
        p = (logits / self.divisor).softmax(-1)
        # In float64 the token that crosses top_p does not depend on the rounding of 128,256 sums.
        whole = p.double().sum(-1, keepdim=True)
        p, ids = self._likeliest(p, whole)
        return self.keep(p, whole), ids

    def keep(self, p: Tensor, whole: Tensor) -> Tensor:
        """Probabilities (B,N) of the likeliest tokens, likeliest first, whose sums with all others'
        are `whole` (B,1) float64 → (B,N), zeros for those that are not kept. p is written."""
        if self.top_k:
            p[:, min(self.top_k, p.shape[-1]) :] = 0
            whole = p.double().cumsum(-1)[:, -1:]
        if self.top_p < 1:
            before = p.double().cumsum(-1) - p
            p[before > self.top_p * whole] = 0
        # The last of the cumulative sums: zeros behind what is kept do not change it.
        return (p / p.double().cumsum(-1)[:, -1:]).float()

    def _likeliest(self, p: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """p (B,V), whose sums are `whole` (B,1), sorted; and the ids. To sort 128,256 numbers takes
        a CPU a third of a token's time, so there it sorts those that can be kept, if they are few.
        """
        lowest = self._lowest(p, whole) if p.is_cpu else None
        if lowest is not None and 0 < (most := int((p >= lowest).sum(-1).max())) < p.shape[-1] / 4:
            ids = p.topk(most, sorted=False).indices.sort(-1).values
            p, order = p.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
            return p, ids.gather(-1, order)
        return p.sort(dim=-1, descending=True, stable=True)

    def _lowest(self, p: Tensor, whole: Tensor) -> Tensor | None:
        """Probabilities (B,1) below which no token is kept; None where none are found quickly."""
        if self.top_k:
            return p.topk(min(self.top_k, p.shape[-1])).values[:, -1:]
        if self.top_p < 1:
            for cut in CUTS:
                lowest = p.amax(-1, keepdim=True) * cut
                within = (p.double() * (p >= lowest)).sum(-1, keepdim=True)
                if (within > self.top_p * whole).all():
                    return lowest
        return None

    def sample(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """logits (B,V) float32 → token ids (B,) int64; row b draws from generators[b] alone."""
        if self.greedy:
            return logits.argmax(-1)
        p, ids = self.probabilities(logits)
        return ids.gather(-1, draw(p, generators)).squeeze(-1)


def draw(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Probabilities (B,N) → where in each row one was drawn, (B,1); row b from generators[b]."""
    u = [torch.rand((), generator=g, dtype=torch.float64, device=g.device) for g in generators]
    cumulative = p.double().cumsum(-1)
    # The draw is scaled by the last sum, which rounding may leave just off 1.
    draw = torch.stack(u).to(p.device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draw, right=True).clamp(max=p.shape[-1] - 1)


def sample_each(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> Tensor:
    """logits (B,V) float32 → token ids (B,) int64; row b is drawn as samplings[b] says, with
    generators[b]. Rows of equal settings are drawn at once."""
    if len(set(samplings)) == 1:
        return samplings[0].sample(logits, generators)
    tokens = torch.empty(len(samplings), dtype=torch.int64, device=logits.device)
    for sampling, rows in rows_of_each(samplings).items():
        where = torch.tensor(rows, device=logits.device)
        tokens[where] = sampling.sample(logits[where], [generators[row] for row in rows])
    return tokens


def rows_of_each(samplings: Sequence[Sampling]) -> dict[Sampling, list[int]]:
    """Returns the rows that have the same settings."""
    rows: dict[Sampling, list[int]] = {}
    for row, sampling in enumerate(samplings):
        rows.setdefault(sampling, []).append(row)
    return rows


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log of the untempered probability of `tokens` (B,) under `logits` (B,V): (B,)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
