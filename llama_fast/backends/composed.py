"""What a backend serves by two kernels of its own, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dispatch import OPS, Implementation
from ..ops.logits import Wanted, in_blocks


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


def linear_cross_entropy_quantized(
    linear: Implementation, backward_x: Implementation
) -> Implementation:
    """The row of that name: a backend's rows of `linear_quantized` and of its gradient, in turn for
    each block of logits."""

    def launch(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        V: int,
        bits: int,
        group_size: int,
        targets: torch.Tensor,
        ignore_index: int,
        need_x: bool,
        mean: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, form = (codes, scales, offsets), (bits, group_size)

        def to_x(d_logits: torch.Tensor) -> torch.Tensor:
            return backward_x.launch(d_logits, *weight, x.shape[-1], *form)

        wanted = Wanted.of("linear_cross_entropy_quantized", x, V, targets, ignore_index, mean)
        return in_blocks(
            x,
            V,
            wanted,
            lambda rows: linear.launch(rows, *weight, V, *form),
            to_x if need_x else None,
            quantized=True,
        )

    def unsupported(x: torch.Tensor, *others: Any) -> list[str]:
        return linear.unsupported(x, *others[:6])

    return Implementation(
        launch, unsupported, lambda *args: "by linear_quantized, a block of rows at a time"
    )
