"""Tensors whose rows lie more than 2³¹ elements apart: every index has to be of 64 bits.

Their memory is reserved and never touched between the rows, so it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama_fast import QuantizedWeight
from llama_fast.dispatch import OPS
from llama_fast.ops.inputs import randn
from llama_fast.ops.quantized_kv import quantize
from llama_fast.ops.rope import tables

from .backends import BACKENDS, device, on

FAR = 2**31 + 64
DTYPE = torch.bfloat16
B, T, S, H, K, D, C = 2, 3, 9, 4, 2, 64, 128


def spread(x: torch.Tensor) -> torch.Tensor:
    """A copy of x, its two entries along the first dim FAR elements apart."""
    far = torch.empty(FAR + x[0].numel(), dtype=x.dtype, device=x.device)
    far = far.as_strided(x.shape, (FAR, *x.stride()[1:]))
    return far.copy_(x)


# op → (arguments, indices of those that may have any stride)
def arguments(g: torch.Generator, to: str) -> dict[str, tuple[tuple, tuple[int, ...]]]:
    def new(*shape: int) -> torch.Tensor:
        return randn(g, *shape, dtype=DTYPE, device=to)

    q, k, v = new(B, T, H, D), new(B, T, K, D), new(B, T, K, D)
    k_cache, v_cache = new(B, S, K, D), new(B, S, K, D)
    cos, sin = tables(g, S, D // 2, device=to)
    lengths = torch.tensor([4, 9], device=to)
    one = new(B, 1, H, D)
    quantized = QuantizedWeight.from_float(new(C, C), 8, 64)
    (k8, k_scale), (v8, v_scale) = quantize(k_cache), quantize(v_cache)
    in_8_bits = (k8, v8, True, None, lengths, False, k_scale, v_scale)
    return {
        "rms_norm": ((new(2, C), new(C), 1e-5), (0,)),
        "add_rms_norm": ((new(2, C), new(2, C), new(C), 1e-5), (0, 1)),
        "swiglu": ((new(2, C), new(2, C)), (0, 1)),
        "rope": ((q, k, cos[:T], sin[:T], False), (0, 1)),
        "kv_append": ((q, k, v, cos, sin, k_cache, v_cache, lengths, False), (0, 1, 2, 5, 6)),
        "attention": ((q, k_cache, v_cache, True, None, lengths, False), (0, 1, 2)),
        "attention of one query": ((one, k_cache, v_cache, True, None, lengths, False), (0, 1, 2)),
        "kv_append in 8 bits": (
            (q, k, v, cos, sin, k8, v8, lengths, False, k_scale, v_scale),
            (0, 1, 2, 5, 6, 9, 10),
        ),
        "attention in 8 bits": ((q, *in_8_bits), (0, 1, 2, 7, 8)),
        "attention in 8 bits, of one query": ((one, *in_8_bits), (0, 1, 2, 7, 8)),
        "linear": ((new(2, C), new(C, C)), (0,)),
        "linear, quantised": ((new(2, C), *quantized.arguments), (0,)),
        "linear with swiglu": ((new(2, C), new(C, C), None, None, 0, 0, 0, "swiglu"), (0,)),
        "linear with swiglu, quantised": ((new(2, C), *quantized.arguments, "swiglu"), (0,)),
    }


NAMES = [*arguments(torch.Generator(), "cpu")]


def results(op: Callable, args: tuple) -> list[torch.Tensor]:
    """What the op returns, and the tensors that it may have written."""
    out = op(*args)
    return [*(out if isinstance(out, tuple) else (out,)), *(a for a in args if torch.is_tensor(a))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_far_apart(name, backend):
    op = OPS[name.replace(",", " ").partition(" ")[0]]
    args, free = arguments(torch.Generator().manual_seed(0), device(backend))[name]
    far = tuple(spread(a) if i in free else a for i, a in enumerate(args))
    far = tuple(a.clone() if torch.is_tensor(a) and i not in free else a for i, a in enumerate(far))
    with on(backend):
        reasons = op.explain(*far).reasons[backend.partition("-")[0]]
        if reasons:
            pytest.skip(f"the backend says: {'; '.join(reasons)}")
        for near, distant in zip(results(op, args), results(op, far), strict=True):
            assert torch.equal(near, distant)
