"""What a value of a config must be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ConfigError

# The largest size of one dimension: what a 32-bit index in a kernel can count.
MAX_SIZE = 2**31 - 1
# What weights are stored in; a model may compute in float64 too.
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} is {value}; it must be between 1 and {MAX_SIZE}")


def check_number(name: str, value: object, minimum: float = -math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _finite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")
    if value < minimum:
        raise ConfigError(f"{name} is {value}; it must be at least {minimum:g}")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_dtype(
    dtype: object, allowed: tuple[torch.dtype, ...] = (*STORED_DTYPES, torch.float64)
) -> None:
    if dtype not in allowed:
        raise ConfigError(
            f"dtype is {dtype!r}; it must be one of {', '.join(map(str, allowed))} (integers: "
            'quantize="int8")'
        )


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Inside of the block, a ConfigError calls our fields by the names that a file has for them."""
    try:
        yield
    except ConfigError as error:
        ours = "|".join(sorted(names, key=len, reverse=True))
        text = re.sub(rf"\b({ours})\b", lambda found: names[found.group()], str(error))
        raise ConfigError(text) from None


def need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{key} is missing; a Llama config must have it")
    return config[key]
