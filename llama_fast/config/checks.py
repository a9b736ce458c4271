"""What a value of a config must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

# The largest size of one dimension: what a 32-bit index in a kernel can count.
MAX_SIZE = 2**31 - 1


def check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} is {value}; it must be between 1 and {MAX_SIZE}")


def check_number(name: str, value: object, minimum: float = -math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")
    if value < minimum:
        raise ConfigError(f"{name} is {value}; it must be at least {minimum:g}")


def need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{key} is missing; a Llama config must have it")
    return config[key]
