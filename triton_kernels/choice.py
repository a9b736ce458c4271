"""Launch configurations as data: what was measured on this device, else the kernel's heuristic.

A configuration is a frozen dataclass beside its kernel, whose fields are knobs with a range. It is
chosen by a shape: the few numbers that decide it, rounded to classes by the kernel's launcher. The
measured ones are files, configs/<stem>.<device>.json, written by `llama-fast bench --tune`; nothing
is ever measured by itself, at import or at a first call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .chips import Chip

FOLDER = Path(__file__).parent / "configs"
Config = TypeVar("Config")


def knob(least: int, most: int, *, step: int = 0, default: Any = dataclasses.MISSING) -> Any:
    """A field of a configuration, between `least` and `most`: powers of two, or steps of `step`."""
    metadata = {"least": least, "most": most, "step": step}
    return dataclasses.field(default=default, metadata=metadata)


class Choice(NamedTuple):
    """What a configuration is chosen for."""

    stem: str
    kernel: str
    shape: tuple[tuple[str, int | str], ...]


class ConfigFileError(ValueError):
    """A file of measured configurations that does not fit the kernels."""


def chosen(stem: str, kernel: str, chip: Chip, default: Config, **shape: int | str) -> Config:
    """The configuration of `kernel`, of triton_kernels/<stem>.py, for such a shape on this chip:
    the measured one where there is one, else `default`, the heuristic's."""
    if _trial is None and not chip.device:
        return default
    choice = Choice(stem, kernel, tuple(shape.items()))
    config = measured(stem, chip.device).get(choice, {}) if chip.device else {}
    config = dataclasses.replace(default, **config) if config else default
    if _trial is not None:
        config = _trial.configs.get(choice, config)
        _trial.made[choice] = config
    return config


def file_of(stem: str, device: str) -> Path:
    return FOLDER / f"{stem}.{device}.json"


@functools.cache
def measured(stem: str, device: str) -> dict[Choice, dict[str, Any]]:
    """The rows of a file, fields of a configuration each; none where there is no file.

    Raises ConfigFileError, naming the file, when it cannot be read.
    """
    path = file_of(stem, device)
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            Choice(stem, row["kernel"], tuple(row["shape"].items())): dict(row["config"])
            for row in rows
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigFileError(
            f"{path} holds no launch configurations ({type(error).__name__}: {error}); delete it, "
            "or write it again with llama-fast bench --tune"
        ) from error


@dataclasses.dataclass
class Trial:
    """`configs` to use, whatever was measured, and every choice that was `made`."""

    configs: dict[Choice, Any]
    made: dict[Choice, Any]


_trial: Trial | None = None


@contextmanager
def trying(configs: dict[Choice, Any]) -> Iterator[dict[Choice, Any]]:
    """Inside the block these configurations are used; yields all choices that are made there."""
    global _trial
    before, _trial = _trial, Trial(configs, {})
    try:
        yield _trial.made
    finally:
        _trial = before


def neighbours(config: Config) -> Iterator[Config]:
    """The configurations one step away, each in one knob: half or twice it, or a step less or
    more, within its range; a switch turned."""
    for field in dataclasses.fields(config):
        value, knob = getattr(config, field.name), field.metadata
        if isinstance(value, bool):
            values = [not value]
        elif knob["step"]:
            values = [value - knob["step"], value + knob["step"]]
        else:
            values = [value // 2, value * 2]
        for other in values:
            if isinstance(value, bool) or knob["least"] <= other <= knob["most"]:
                yield dataclasses.replace(config, **{field.name: other})
