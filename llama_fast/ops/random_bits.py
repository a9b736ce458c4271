"""Random bits that depend on a seed and a place alone, and rounding by them.

A word of 32 bits for each j is hashed from (seed, stream, j), so a result that was rounded by it
does not depend on threads, blocks, backends or what was drawn before:

    k = splitmix64(seed + stream · 0x9E3779B97F4A7C15), k0 and k1 its lower and upper half
    x = (j mod 2³²) ^ k0 ^ (j div 2³²) · 0x9E3779B9
    x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x ^= k1; x *= 0x846CA68B; word = x ^ x >> 16

splitmix64 is that of Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
(2014); the other is Wellons's lowbias32 with half of the key between its two products. For one seed
it is a permutation: within 2³² places no word comes twice.

Stochastic rounding of a float32 to bfloat16 adds a draw of 16 bits to the 16 that are cut: a number
between two neighbours becomes either, with the probability that makes its mean exact. Infinity and
NaN stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN64, GOLDEN32 = 0x9E3779B97F4A7C15, 0x9E3779B9
WORD, LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def splitmix64(x: int) -> int:
    """Returns 64 bits that stand for an integer x: the next ones after the state x."""
    x = (x + GOLDEN64) & LONG
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & LONG
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & LONG
    return x ^ x >> 31


def seed_of(seed: int, first: int, second: int) -> int:
    """Returns a seed for each pair of numbers, another one each, from 0 to 2⁶³ - 1."""
    return splitmix64(splitmix64(splitmix64(seed) ^ first) ^ second) >> 1


def key(seed: int, stream: int) -> tuple[int, int]:
    """Returns (k0, k1), 32 bits each."""
    k = splitmix64((seed + stream * GOLDEN64) & LONG)
    return k & WORD, k >> 32


def words(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """Returns the words of the places 0 to count - 1: (count,) int64, each in [0, 2³²)."""
    k0, k1 = key(seed, stream)
    j = torch.arange(count, dtype=torch.int64, device=device)
    x = (j & WORD) ^ k0 ^ ((j >> 32) * GOLDEN32 & WORD)
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = ((x ^ x >> 15) ^ k1) * 0x846CA68B & WORD
    return x ^ x >> 16


def to_bfloat16(x: Tensor, seed: int, stream: int) -> Tensor:
    """Returns float32 numbers x of any shape as bfloat16, rounded stochastically. Elements 2j and
    2j + 1 draw the lower and the upper half of word j."""
    pairs = words(seed, stream, -(-x.numel() // 2), x.device)
    draws = torch.stack((pairs & 0xFFFF, pairs >> 16), 1).view(-1)[: x.numel()].view(x.shape)
    bits = x.contiguous().view(torch.int32).to(torch.int64) + draws
    # Cut to the upper half, which bfloat16 has. A sum beyond 32 bits is that of a NaN.
    cut = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), cut, x.to(torch.bfloat16))
