"""Comparing a patched model with itself as it was: the first module that departs; the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.compare import relative_rms

# Relative differences (of the root mean square) that rounding alone can explain, by dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verification:
    """How far a patched model is from itself without the patch, on the same inputs.

    departed    the first module, in the order of the calls, whose output differs by more than
                `tolerance`, or None
    difference  the largest relative difference of any module: |patched - own| / |own|, each the
                root mean square over the output
    kl          mean Kullback-Leibler divergence of the patched model's next-token distribution from
                its own, in nats; NaN for a model without logits
    agreement   the fraction of positions whose most likely token is the same; NaN without logits
    """

    departed: str | None
    difference: float
    tolerance: float
    kl: float
    agreement: float

    @property
    def ok(self) -> bool:
        return self.departed is None

    def __str__(self) -> str:
        where = f"departs first at {self.departed}" if self.departed else "departs nowhere"
        return (
            f"{where}; largest relative difference {self.difference:.2g} (tolerance "
            f"{self.tolerance:.2g}), KL {self.kl:.2g}, same argmax {self.agreement:.2%}"
        )


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the last output of each module by its name, in the order of the calls."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                outputs.pop(name, None)
                outputs[name] = first.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def compare(
    own: dict[str, Tensor],
    patched: dict[str, Tensor],
    logits: tuple[Tensor | None, Tensor | None],
    tolerance: float | None,
) -> Verification:
    """Outputs by module name of both runs, and the logits (..., V) of both."""
    departed, largest = None, 0.0
    for name, expected in own.items():
        if name not in patched:
            continue
        limit = TOLERANCES.get(expected.dtype, 1e-6) if tolerance is None else tolerance
        difference = relative_rms(patched[name], expected)
        if not difference <= limit and departed is None:  # NaN departs too
            departed = name
        largest = max(largest, difference) if difference == difference else difference
    kl = agreement = float("nan")
    if logits[0] is not None and logits[1] is not None:
        p, q = (x.double().log_softmax(-1) for x in logits)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    dtype = next(iter(own.values())).dtype if own else torch.float32
    limit = TOLERANCES.get(dtype, 1e-6) if tolerance is None else tolerance
    return Verification(departed, largest, limit, kl, agreement)
