"""Who has `swiglu` in one function."""

from __future__ import annotations

from torch import Tensor

OP = "swiglu"


def of_liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def of_flashinfer(gate: Tensor, up: Tensor) -> Tensor:
    """It takes both halves as one tensor, which they are in this model."""
    import flashinfer

    both = gate.as_strided((*gate.shape[:-1], 2 * gate.shape[-1]), gate.stride())
    return flashinfer.activation.silu_and_mul(both)


BASELINES = {"liger-kernel": of_liger, "flashinfer": of_flashinfer}
