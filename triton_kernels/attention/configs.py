"""Launch configurations of attention: how large tiles are, by chip, head dim and dtype, and into
how many parts the keys are cut; and the two factors in which the scale comes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..chips import Chip
from ..choice import knob


@dataclass(frozen=True)
class AttentionConfig:
    """Rows of queries and of keys of a tile, the warps that share it, and tiles on the way;
    of the forward pass, whether they are copied by TMA."""

    block_m: int = knob(16, 256)
    block_n: int = knob(16, 256)
    num_warps: int = knob(1, 16)
    num_stages: int = knob(1, 5, step=1)
    tma: bool = False


@dataclass(frozen=True)
class CombineConfig:
    num_warps: int = knob(1, 16)


@dataclass(frozen=True)
class DeltaConfig:
    """Queries of a program, and its warps."""

    block_n: int = knob(1, 1024)
    num_warps: int = knob(1, 16)


FEW_ROWS = 16  # the fewest rows of a matrix instruction's tile
MAX_PARTS = 64
LEAST_PART = 256  # keys, below which a part costs more than it helps


def forward_config(chip: Chip, rows: int, D: int, dtype: torch.dtype) -> AttentionConfig:
    """`rows` is T·G, of one KV head; D is rounded up to a power of two.

    A tile of queries stays in registers or shared memory while tiles of k and v stream by, so its
    size decides how often k and v are read from L2, and the accumulator (block_m × D float32) how
    many registers are left: 128 × 128 takes 64 of each thread of 8 warps.
    """
    if dtype == torch.float32:  # multiply-adds without matrix instructions, which hold whole rows
        if D > 128:
            return AttentionConfig(16, 16, num_warps=4 if chip.amd else 16, num_stages=1)
        return AttentionConfig(16, 32, num_warps=8 if D > 64 else 4, num_stages=1)
    if rows <= FEW_ROWS:  # bound by memory: small tiles, several on the way
        stages = (3 if D > 128 or D <= 64 else 4) - (not chip.roomy)
        return AttentionConfig(FEW_ROWS, 32 if D > 64 else 64, 4, stages)
    if D > 128:
        return AttentionConfig(128 if chip.hopper and rows > 64 else 64, 32, 8, num_stages=2)
    # Registers hold both sides of mma.sync's products: wide heads leave room for 32 keys. So does
    # gfx942 for heads of any width.
    block_n = 64 if chip.hopper or (D <= 64 and not chip.amd) else 32
    if rows <= 64 or not chip.roomy or chip.amd:
        return AttentionConfig(64, block_n, num_warps=4, num_stages=2)
    return AttentionConfig(128, block_n, num_warps=8, num_stages=3)


def int8_config(chip: Chip, rows: int, D: int, dtype: torch.dtype) -> AttentionConfig:
    """For keys and values in 8 bits: as `forward_config` for few rows and in float32. The values
    become q's dtype in registers, so the other tiles are smaller, or shared by more warps; float16
    keeps a unit besides."""
    config = forward_config(chip, rows, D, dtype)
    if dtype == torch.float32 or rows <= FEW_ROWS:
        return config
    if D > 128:
        return replace(config, block_m=64, block_n=16)
    if chip.hopper:
        return replace(config, block_n=32) if rows <= 64 < D else config
    crowded = not chip.amd and (D > 64 or dtype == torch.float16)
    return replace(config, block_n=32, num_warps=8 if crowded else config.num_warps)


def backward_configs(
    chip: Chip, D: int, dtype: torch.dtype
) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the dk, dv kernel, which holds two accumulators of block_n × D, and of the dq kernel."""
    if dtype == torch.float32:
        if D > 128 and not chip.amd:
            return AttentionConfig(16, 16, 8, 1), AttentionConfig(16, 32, 16, 1)
        warps = 8 if 64 < D <= 128 else 4
        return AttentionConfig(16, 16, 4, 1), AttentionConfig(16, 16, warps, 1)
    warps = 8 if chip.arch == 80 and D > 64 else 4  # of dk and dv, for whose sums ptxas needs more
    if D > 128:
        return AttentionConfig(32, 32, warps, 1), AttentionConfig(32, 32, 4, num_stages=1)
    if not chip.hopper:
        return AttentionConfig(32, 64, warps, 1), AttentionConfig(64, 32, 4, num_stages=1)
    block_m = 32 if D > 64 else 64
    return AttentionConfig(block_m, 128, 8, num_stages=2), AttentionConfig(128, 64, 8, num_stages=2)


def parts_for(chip: Chip, programs: int, S: int, block_n: int) -> tuple[int, int]:
    """(parts, keys of each): as many parts as two programs a processor need, of LEAST_PART or more
    keys. It depends on S, not on lengths: those are not known here."""
    wanted = 2 * chip.processors // max(programs, 1)
    parts = max(1, min(wanted, MAX_PARTS, S // LEAST_PART))
    tiles = -(-S // block_n)
    part = -(-tiles // parts) * block_n
    return (-(-S // part) if part else 1), part


def split_scale(scale: float | None, D: int) -> tuple[float, float]:
    """(unit, factor): scale, or 1/√D without one, is their product, unit a power of two and factor
    in [1, 2)."""
    mantissa, exponent = math.frexp(D**-0.5 if scale is None else scale)
    return math.ldexp(1.0, exponent - 1), 2 * mantissa
