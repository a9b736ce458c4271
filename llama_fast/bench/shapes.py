"""What a model's shape gives each op: the arguments of benchmarks and profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops  # noqa: F401  declares them
from ..config import LlamaConfig
from ..dispatch import OPS
from ..errors import ConfigError
from ..nn.rope import rope_tables
from ..ops.model_inputs import ModelInputs, Work

__all__ = ["NAMES", "Work", "problem_shapes"]

NAMES = tuple(name for name, op in OPS.items() if op.at_model_size is not None)


def problem_shapes(
    op: str,
    config: LlamaConfig,
    work: Work,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    gradient: bool = False,
) -> dict[str, Callable[[int], tuple[Any, ...]]]:
    """What a model of this shape calls an op with.

    op        one of NAMES
    gradient  with what the public function asks for where a gradient is to be recorded
    device    "meta" for shapes alone: nothing is drawn
    Returns, by a name such as "linear head", a function of a seed that makes the arguments of one
    call in the order of the op's schema: normal numbers, never zeros, laid out as in the model.
    Raises ConfigError for another op.
    """
    if op not in NAMES:
        raise ConfigError(f"no model calls an op named {op!r}; there are {', '.join(NAMES)}")

    def made(seed: int) -> dict[str, Callable[[], tuple]]:
        m = ModelInputs(config, work, dtype, device, seed, rope_tables, gradient)
        return OPS[op].at_model_size(m)

    return {name: lambda seed=0, name=name: tuple(made(seed)[name]()) for name in made(0)}
