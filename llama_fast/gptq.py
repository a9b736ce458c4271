"""Rounding that makes up for its own errors: GPTQ.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2023).

A linear is to change its outputs on a text as little as it can: minimise ‖X (W - Ŵ)ᵀ‖² over codes,
where X (N, C_in) are its inputs there. With H = XᵀX, columns are rounded one after another, and the
error of each is spread over those that are still to come:

    U      the upper Cholesky factor of H⁻¹
    e      = (w_i - ŵ_i) / U_ii            of the column i that was rounded, for every row
    w_j    -= e U_ij                       for every column j > i

The scales of a group are found when its turn comes, so they fit the weights as they have become.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import QuantizedWeight
from .ops.linear_quantized import decode
from .ops.quantized_weight import encode
from .quantize import WeightFormat, best_fit

# Share of the mean of H's diagonal that is added to it: H has no inverse where inputs are few, or
# depend on each other.
DAMPING = 0.01


class Inputs:
    """H = XᵀX of the inputs that a linear is called with, gathered as a forward pre-hook."""

    def __init__(self) -> None:
        self.H: Tensor | None = None

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        self.H = x.t() @ x if self.H is None else self.H.addmm_(x.t(), x)


@torch.no_grad()
def round_compensated(weight: Tensor, H: Tensor, form: WeightFormat) -> QuantizedWeight:
    """`weight` (C_out, C_in), of any float dtype, rounded for inputs with XᵀX = `H` (C_in, C_in).

    Takes 4 · C_in · (C_out + 3 C_in) bytes of memory. Raises ShapeError for a weight that cannot be
    stored so.
    """
    C_out, C_in = weight.shape
    size = form.group_size
    made = QuantizedWeight(C_out, C_in, form.bits, size, form.symmetric, weight.device)
    U = _inverse_factor(H.to(weight.device))
    w = weight.t().float().contiguous()  # (C_in, C_out): a column of the weight is contiguous
    codes = torch.empty(C_in, C_out, dtype=torch.uint8, device=weight.device)
    scales, offsets = [], []
    for start in range(0, C_in, size):
        group = w[start : start + size]
        padded = F.pad(group.t(), (0, size - len(group)))  # (C_out, size)
        scale, offset = best_fit(padded, form.bits, form.symmetric)
        scales.append(scale)
        offsets.append(offset)
        of_group = scale.float(), None if offset is None else offset.float()
        errors = torch.empty_like(group)
        for i in range(len(group)):
            row = group[i]
            code = encode(row.unsqueeze(-1), scale, offset, form.bits).squeeze(-1)
            codes[start + i] = code
            at = start + i
            errors[i] = (row - decode(code.float(), *of_group, form.bits)) / U[at, at]
            group[i + 1 :].addr_(U[at, at + 1 : start + len(group)], errors[i], alpha=-1)
        end = start + len(group)
        w[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    padded = F.pad(codes.t(), (0, -C_in % size)).view(C_out, -1, size)
    together = None if form.symmetric else torch.stack(offsets, 1)
    made.set_rows(0, padded, torch.stack(scales, 1), together)
    return made


def _inverse_factor(H: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped H."""
    diagonal = H.diagonal()
    damped = H + torch.diag(diagonal.mean() * DAMPING + (diagonal == 0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
