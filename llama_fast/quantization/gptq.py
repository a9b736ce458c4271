"""Rounding that makes up for its own errors: GPTQ.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2023).

A linear is to change its outputs on a text as little as it can: minimise ‖X (W - Ŵ)ᵀ‖² over
quantised values, where X (N, C_in) are its inputs there. With H = XᵀX, columns are rounded one
after another, and the error of each is spread over those that are still to come:

    U      the upper Cholesky factor of H⁻¹
    e      = (w_i - ŵ_i) / U_ii            of the column i that was rounded, for every row
    w_j    -= e U_ij                       for every column j > i

The scales of a group are found when its turn comes, so they fit the weights as they have become.

The columns with the largest inputs, by H's diagonal, go first, while there are many left to make up
for them. A group stays together, for the sake of its scales: groups are taken by the largest of
their columns, and the columns of a group by their own. Codes are stored in the model's order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.quantization import WeightFormat
from ..errors import ShapeError
from ..ops import QuantizedWeight
from ..ops.quantized_layout import numbers
from ..ops.rounding import best_fit, encode, refuse_non_finite

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

    Takes 4 · C_in · (C_out + 4 C_in) bytes of memory. Raises ShapeError for a weight that cannot be
    stored so, and for inputs that were not finite.
    """
    if not torch.isfinite(H).all():
        raise ShapeError(
            "the calibration text makes activations of the model that are not finite, so no "
            "rounding can make up for its errors there; give another text, or a wider dtype"
        )
    C_out, C_in = weight.shape
    size = form.group_size
    made = QuantizedWeight(C_out, C_in, form.bits, size, form.symmetric, weight.device)
    H = H.to(weight.device)
    groups = _in_order(H.diagonal(), size)
    order = torch.cat(groups)
    U = _inverse_factor(H[order[:, None], order])
    w = weight.t().float()[order]  # (C_in, C_out): a column of the weight is contiguous
    qdata = torch.empty(len(groups) * size, C_out, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(C_out, len(groups), dtype=torch.float16, device=weight.device)
    minima = None if form.symmetric else torch.empty_like(scales)
    start = 0
    for columns in groups:
        end = start + len(columns)
        group, of_group = w[start:end], int(columns[0]) // size
        padded = F.pad(group.t(), (0, size - len(group)))  # (C_out, size)
        scale, offset = best_fit(padded, form.bits, form.symmetric)
        refuse_non_finite(padded, scale, offset)
        scales[:, of_group] = scale
        if minima is not None:
            minima[:, of_group] = offset
        exact = scale.float(), None if offset is None else offset.float()
        errors = torch.empty_like(group)
        for i, column in enumerate(columns.tolist()):
            row, at = group[i], start + i
            code = encode(row.unsqueeze(-1), scale, offset, form.bits).squeeze(-1)
            qdata[column] = code
            errors[i] = (row - numbers(code.float(), *exact, form.bits)) / U[at, at]
            group[i + 1 :].addr_(U[at, at + 1 : end], errors[i], alpha=-1)
        w[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
        start = end
    made.set_rows(0, qdata.t().reshape(C_out, len(groups), size), scales, minima)
    return made


def _in_order(diagonal: Tensor, size: int) -> list[Tensor]:
    """The columns of each group, (size,) or fewer of the last one, groups and columns by falling
    diagonal of H."""
    columns = torch.arange(len(diagonal), device=diagonal.device).split(size)
    groups = [c[diagonal[c].argsort(descending=True, stable=True)] for c in columns]
    return sorted(groups, key=lambda c: -float(diagonal[c[0]]))


def _inverse_factor(H: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped H."""
    diagonal = H.diagonal()
    damped = H + torch.diag(diagonal.mean() * DAMPING + (diagonal == 0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
