"""RMSNorm, alone or with the residual sum before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ShapeError


class RMSNorm(nn.Module):
    """Stands where `torch.nn.RMSNorm` stood, for one normalised dim with a weight.

    `norm(x)` → y, of x's shape (..., C). `norm(x, residual)` → (y, x + residual): the sum is
    normalised and returned too, in one kernel.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if len(shape) != 1 or not elementwise_affine:
            raise ShapeError(
                f"RMSNorm normalises the last dim and has a weight; given {shape} and "
                f"elementwise_affine={elementwise_affine}. Use torch.nn.RMSNorm for other forms"
            )
        self.normalized_shape = shape
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        # torch.nn.RMSNorm means by None the machine epsilon of the input's dtype.
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if residual is None:
            return ops.rms_norm(x, self.weight, eps)
        return ops.add_rms_norm(x, residual, self.weight, eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"
