"""What a backend serves by two kernels of its own, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..registry import OPS, Implementation


def linear_swiglu(name: str, linear: Implementation, swiglu: Implementation) -> Implementation:
    """The row of `linear_swiglu` or `linear_swiglu_quantized`: a backend's row of the linear op
    `name`, then its row of `swiglu` on the halves of the result, which it always serves."""

    def launch(*args: Any) -> torch.Tensor:
        return swiglu.launch(*linear.launch(*args).chunk(2, dim=-1))

    def prepare(x: torch.Tensor, *weight: Any) -> Callable[..., torch.Tensor]:
        multiply = linear.prepare(x, *weight)
        activate = swiglu.prepare(*OPS[name].fake(x.to("meta"), *weight).chunk(2, dim=-1))
        return lambda *args: activate(*multiply(*args).chunk(2, dim=-1))

    return Implementation(
        launch,
        linear.unsupported,
        lambda *args: f"by {name} and swiglu, one after the other",
        prepare if linear.prepare and swiglu.prepare else None,
    )
