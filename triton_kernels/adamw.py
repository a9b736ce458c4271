"""One step of AdamW in one pass, as llama_fast/ops/adamw.py defines it.

    m = m + (1 - beta1) (g - m)      v = beta2 · v + (1 - beta2) g²      g = grad · grad_scale
    param = param · decay - step_size · m / (√v · correction + eps)

Bound by memory: each tensor is read once and written once. 8-bit moments have a scale for each 256
elements (ops/quantized_moments.py), so a program's tile is (blocks, 256), and a block's largest
moments are maxima of its rows. Random bits are hashed from a key and the element's number
(ops/random_bits.py), so they are those of every other backend. Unmeasured so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chips import chip_of
from .choice import chosen, knob
from .launch import TYPES, launch
from .shapes import FULL, Dims, empty

BLOCK = 256  # elements of a scale
TINY = tl.constexpr(2.0**-126)  # the least scale that is divided by


@triton.jit
def random_words(j, key0, key1):
    """Word j of a key, for j int64: uint32."""
    x = j.to(tl.uint32) ^ key0.to(tl.uint32) ^ ((j >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) ^ key1.to(tl.uint32)) * 0x846CA68B
    tl.static_assert(x.dtype == tl.uint32)  # a wider product would be another one
    return x ^ (x >> 16)


@triton.jit(
    do_not_specialize=[
        "n", "grad_scale", "towards_grad", "beta2", "of_square", "correction", "eps", "decay",
        "step_size", "param_key0", "param_key1", "moments_key0", "moments_key1",
    ]
)  # fmt: skip
def adamw_kernel(
    param_ptr,  # (n,) float32 or bfloat16; written
    grad_ptr,  # (n,)
    exp_avg_ptr,  # (n,) float32 or int8; written
    exp_avg_sq_ptr,  # (n,) float32 or uint8; written
    exp_avg_scale_ptr,  # (⌈n / 256⌉,) float32, of 8-bit moments; written
    exp_avg_sq_scale_ptr,  # (⌈n / 256⌉,) float32; written
    n,
    grad_scale,
    towards_grad,  # 1 - beta1
    beta2,
    of_square,  # 1 - beta2
    correction,  # 1 / sqrt(1 - beta2^step)
    eps,
    decay,  # 1 - lr · weight_decay
    step_size,  # lr / (1 - beta1^step)
    param_key0,
    param_key1,
    moments_key0,
    moments_key1,
    EIGHT_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < n
    p = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0).to(tl.float32)
    if EIGHT_BITS:
        exists = block * BLOCK < n
        m_scale = tl.load(exp_avg_scale_ptr + block, mask=exists, other=0.0)
        v_scale = tl.load(exp_avg_sq_scale_ptr + block, mask=exists, other=0.0)
        m = m * tl.abs(m) * (1 / (127.0 * 127.0)) * m_scale[:, None]
        v = v * v * (1 / (255.0 * 255.0))
        v = v * v * v_scale[:, None]

    m = m + (g - m) * towards_grad
    v = v * beta2 + g * g * of_square
    p = p * decay - m * step_size / (eps + tl.sqrt_rn(v) * correction)

    if STOCHASTIC and param_ptr.dtype.element_ty == tl.bfloat16:
        word = random_words(at >> 1, param_key0, param_key1)
        draw = tl.where((at & 1) == 1, word >> 16, word & 0xFFFF)
        u = p.to(tl.uint32, bitcast=True)
        # A NaN, which the sum may have carried into a number, becomes the NaN of all ones.
        wrong = (u & 0x7FFFFFFF) > 0x7F800000
        u = tl.where(wrong, 0xFFFF0000, (u + draw) & 0xFFFF0000).to(tl.uint32)
        p = u.to(tl.float32, bitcast=True)  # exact in bfloat16
    tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=inside)

    if EIGHT_BITS:
        # A sum of what is not finite times 0 is NaN, which a maximum would drop.
        m_scale = tl.max(tl.abs(m), axis=1) + tl.sum(m * 0.0, axis=1)
        v_scale = tl.max(v, axis=1) + tl.sum(v * 0.0, axis=1)
        tl.store(exp_avg_scale_ptr + block, m_scale, mask=exists)
        tl.store(exp_avg_sq_scale_ptr + block, v_scale, mask=exists)
        m_whole = tl.where(m_scale > TINY, m_scale, TINY)[:, None]
        v_whole = tl.where(v_scale > TINY, v_scale, TINY)[:, None]
        m_up = tl.full((BLOCKS, BLOCK), 0.5, tl.float32)
        v_up = m_up
        if STOCHASTIC:
            word = random_words(at, moments_key0, moments_key1)
            m_up = (word & 0xFFFF).to(tl.float32) * (1 / 65536)
            v_up = (word >> 16).to(tl.float32) * (1 / 65536)
        q = tl.floor(tl.sqrt_rn(tl.div_rn(tl.abs(m), m_whole)) * 127.0 + m_up)
        q = tl.where(q < 127.0, q, 127.0)
        q = tl.where(m < 0, -q, q)
        tl.store(exp_avg_ptr + at, q.to(tl.int32).to(tl.int8), mask=inside)
        q = tl.floor(tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(v, v_whole))) * 255.0 + v_up)
        q = tl.where(q < 255.0, q, 255.0)
        q = tl.maximum(q, tl.where(v > 0, 1.0, 0.0))
        tl.store(exp_avg_sq_ptr + at, q.to(tl.int32).to(tl.uint8), mask=inside)
    else:
        tl.store(exp_avg_ptr + at, m, mask=inside)
        tl.store(exp_avg_sq_ptr + at, v, mask=inside)


@dataclass(frozen=True)
class AdamwConfig:
    """Blocks of 256 elements of a program, and its warps."""

    blocks: int = knob(1, 16)
    num_warps: int = knob(1, 16)


def config_for() -> AdamwConfig:
    """8 elements a thread, of four tensors: enough loads in flight."""
    return AdamwConfig(blocks=4, num_warps=4)


GOLDEN, LONG = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF


def random_key(seed: int, stream: int) -> tuple[int, int]:
    """As `key` of llama_fast/ops/random_bits.py, as signed numbers of 32 bits."""
    x = (seed + (stream + 1) * GOLDEN) & LONG
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & LONG
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & LONG
    x ^= x >> 31
    return tuple((half ^ 1 << 31) - (1 << 31) for half in (x & 0xFFFFFFFF, x >> 32))


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    seed: int | None = None,
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
) -> None:
    """As the op of llama_fast.ops.adamw."""
    eight_bits, n = exp_avg_scale is not None, param.numel()
    config = chosen("adamw", "adamw", chip_of(param), config_for(), dtype=TYPES[param.dtype])
    keys = (0, 0, 0, 0) if seed is None else (*random_key(seed, 0), *random_key(seed, 1))
    launch(
        adamw_kernel,
        (-(-n // (config.blocks * BLOCK)),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        exp_avg_scale if eight_bits else exp_avg,
        exp_avg_sq_scale if eight_bits else exp_avg_sq,
        n,
        grad_scale,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
        eps,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        *keys,
        EIGHT_BITS=eight_bits,
        STOCHASTIC=seed is not None,
        BLOCKS=config.blocks,
        BLOCK=BLOCK,
        num_warps=config.num_warps,
    )


def aot_calls(models: list[Dims], brief: bool) -> Iterator[tuple[str, tuple]]:
    numbers = (3, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0)
    for dims in models:
        half = empty(dims.F, dims.C)
        full = empty(dims.F, dims.C, dtype=FULL)
        eight = [empty(dims.F, dims.C, dtype=kind) for kind in (torch.int8, torch.uint8)]
        scales = [empty(dims.F * dims.C // BLOCK, dtype=FULL) for _ in "mv"]
        yield "adamw", (full, full, full, full, *numbers, None)
        yield "adamw", (half, half, full, full, *numbers, 5)
        yield "adamw", (half, half, *eight, *numbers, 5, *scales)
        if not brief:
            yield "adamw", (full, full, *eight, *numbers, 5, *scales)
            yield "adamw", (half, full, full, full, *numbers, None)
