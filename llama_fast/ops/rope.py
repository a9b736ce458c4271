"""Rotary position embedding: each pair of a head's elements is rotated by its position's angle.

Su et al., "RoFormer" (2021). With (a, b) a pair and θ its angle:
    a' = a · cos θ - b · sin θ        b' = b · cos θ + a · sin θ

The pairs are (i, i + D/2), as in Hugging Face's checkpoints, or (2i, 2i + 1), as in Meta's, where
`interleaved`. The tables hold one angle for each pair: llama_fast.nn.rope makes them.

Shapes    q (B,T,H,D), k (B,T,K,D), cos and sin (T, D/2) or (B,T,D/2) float32
          → q (B,T,H,D), k (B,T,K,D)
Layout    q, k and the tables are contiguous in their last dim, with any stride in the others; the
          outputs are contiguous
Rounding  rotated in float32, rounded once

Gradient: the rotation by the negative angle. The tables are constants and have none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dispatch import Case, Cost, Op, Sharding
from ..errors import ShapeError
from . import checks
from .inputs import randn
from .model_inputs import ModelInputs
from .rms_norm import accumulate


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by the angles of their positions.

    q            (B,T,H,D), float32, bfloat16 or float16, D even; a (B,H,T,D) tensor is given as
                 its .transpose(1, 2) and is not copied
    k            (B,T,K,D), of q's dtype and device
    cos, sin     (T, D/2), or (B,T,D/2) where rows have positions of their own; float32
    interleaved  whether the pairs are (2i, 2i + 1) rather than (i, i + D/2)
    Returns the rotated (q, k), contiguous. Raises ShapeError when the arguments do not fit.
    """
    return OP(q, k, cos, sin, interleaved)


def check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> None:
    checks.same_kind("rope", "q", q, k=k)
    checks.heads("rope", q, k=k)
    B, T, _, D = q.shape
    if cos.ndim == 3:
        checks.shape("rope", "cos", cos, (B, T, D // 2), "(B, T, D/2)")
    else:
        checks.shape("rope", "cos", cos, (T, D // 2), "(T, D/2) or (B, T, D/2)")
    checks.shape("rope", "sin", sin, cos.shape, "cos's shape")
    check_tables("rope", q, cos, sin)


def check_tables(op: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The tables are float32 (or float64 beside a float64 q) and on q's device."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype is not torch.float32 and not q.dtype is table.dtype is torch.float64:
            raise ShapeError(f"{op}: {name} is {table.dtype}; it must be torch.float32")
        if table.device != q.device:
            raise ShapeError(
                f"{op}: {name} is on {table.device} and q on {q.device}; "
                f"move it with .to({str(q.device)!r})"
            )


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (.., T, 1, D/2): one angle for all heads
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """`x` (..., D) rotated, contiguous; cos and sin broadcast against (..., D/2)."""
    xf = x.to(accumulate(x.dtype))
    a, b = (xf[..., 0::2], xf[..., 1::2]) if interleaved else xf.chunk(2, dim=-1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return y.to(x.dtype).contiguous()


def save(inputs: tuple, output: tuple) -> tuple:
    _, _, cos, sin, interleaved = inputs
    return (cos, sin), interleaved


def gradient(
    saved: tuple, interleaved: bool, needed: tuple, grad_q: torch.Tensor, grad_k: torch.Tensor
) -> tuple:
    cos, sin = saved
    # The gradient of a sum, say, has stride 0 in every dim; kernels need D contiguous.
    grads = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k))
    return *OP(*grads, cos, -sin, interleaved), None, None, None


def cost(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Cost:
    elements = q.numel() + k.numel()
    return Cost(
        bytes=2 * elements * q.element_size() + 2 * cos.numel() * cos.element_size(),
        flops=3 * elements,
    )


def sharding(q, k, cos, sin, interleaved) -> Sharding:
    table = "BTR" if cos.ndim == 3 else "TR"
    return Sharding(f"BTHD, BTKD, {table}, {table} -> BTHD, BTKD", "B T HK")


def tables(g: torch.Generator, *shape: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles, for cases."""
    angle = randn(g, *shape, dtype=torch.float32, scale=10.0)
    return angle.cos().to(device), angle.sin().to(device)


def at_model_size(m: ModelInputs) -> dict[str, Callable[[], tuple]]:
    def make() -> tuple:
        q, k, _ = m.heads()
        return q, k, *(table[-m.work.tokens :] for table in m.rope_tables()), False

    return {"rope": make}


def cases() -> list[Case]:
    def heads(B, T, H, K, D, *, interleaved=False, of_rows=False):
        def make(g, dtype, device):
            q = randn(g, B, T, H, D, dtype=dtype, device=device)
            k = randn(g, B, T, K, D, dtype=dtype, device=device)
            shape = (B, T, D // 2) if of_rows else (T, D // 2)
            return q, k, *tables(g, *shape, device=device), interleaved

        return make

    def fused(B, T, H, K, D, *, interleaved):
        def make(g, dtype, device):
            qkv = randn(g, B, T, H + 2 * K, D, dtype=dtype, device=device)
            q, k, _ = qkv.split((H, K, K), dim=2)
            return q, k, *tables(g, T, D // 2, device=device), interleaved

        return make

    def transposed(g, dtype, device):
        q = randn(g, 2, 6, 5, 64, dtype=dtype, device=device).transpose(1, 2)
        k = randn(g, 2, 3, 5, 64, dtype=dtype, device=device).transpose(1, 2)
        cos, sin = tables(g, 9, 32, device=device)
        return q, k, cos[4:], sin[4:], False

    return [
        Case("1b prefill", heads(2, 9, 32, 8, 64)),
        Case("8b decode", heads(1, 1, 32, 8, 128)),
        Case("8b decode, interleaved", heads(1, 1, 32, 8, 128, interleaved=True)),
        Case("a position for each row", heads(3, 5, 4, 2, 64, of_rows=True)),
        Case("interleaved rows", heads(3, 5, 4, 4, 72, of_rows=True, interleaved=True)),
        Case("odd pairs", heads(2, 3, 5, 1, 22)),
        Case("odd pairs, interleaved", heads(2, 3, 5, 1, 22, interleaved=True)),
        Case("one pair", heads(1, 4, 3, 3, 2)),
        Case("parts of one qkv", fused(2, 7, 6, 2, 80, interleaved=False)),
        Case("parts of one qkv, interleaved", fused(2, 7, 6, 2, 80, interleaved=True)),
        Case("heads before tokens", transposed),
        Case("no tokens", heads(2, 0, 4, 2, 64)),
    ]


OP = Op(
    name="rope",
    check=check,
    autocast="widest",
    eager=eager,
    save=save,
    gradient=gradient,
    constants=("cos", "sin"),
    sharding=sharding,
    cost=cost,
    cases=cases,
    at_model_size=at_model_size,
)
