"""Why no token can be drawn from a row of logits: they are NaN or infinite."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from ..errors import LogitsError
from ..model import Llama


def not_finite(model: Llama, logits: Tensor, what: str) -> LogitsError:
    """Returns the error for logits (V,) that have no probabilities: it says what they are, `what`
    they are of, and the likely reason."""
    nan, infinite = int(logits.isnan().sum()), int(logits.isposinf().sum())
    found = (
        f"{nan} are NaN" if nan else f"{infinite} are infinite" if infinite else "all are -infinite"
    )
    return LogitsError(
        f"no token can be drawn for {what}: of its {len(logits)} logits {found}. {_reason(model)}"
    )


def _reason(model: Llama) -> str:
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if weight.is_floating_point() and not weight.isfinite().all():
            return (
                f"{name} has values that are not finite: the checkpoint is damaged, or "
                f"{weight.dtype} cannot hold its numbers"
            )
    if model.dtype is torch.float16:
        return (
            "float16 holds numbers up to 65,504, and something that the model computed was larger: "
            "load it with dtype=torch.bfloat16 or torch.float32 (--dtype bfloat16)"
        )
    return (
        "All weights are finite, so an op may have failed: see whether the eager definitions give "
        'the same, with use_backend("eager") (--backend eager)'
    )
