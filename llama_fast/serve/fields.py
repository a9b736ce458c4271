"""Reads the fields of a JSON object one by one, and says which is wrong and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import RequestError

# How JSON calls Python's types.
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
KINDS |= {float: "a number", type(None): "null"}


class Fields:
    """The fields of an object that a request holds; null is the same as none.

    Each method takes a field, and returns `default` where there is none. Raises RequestError for a
    value of another kind. where: the path of the object in the request, "" for the request itself.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        self.where = where
        if not isinstance(value, dict):
            what = f"{where} is" if where else "the request is"
            raise RequestError(f"{what} {kind(value)}; give a JSON object", param=where or None)
        self._left = {key: x for key, x in value.items() if x is not None}

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def any(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str, default: Any = None) -> Any:
        return self._of(name, default, str)

    def flag(self, name: str, default: Any = False) -> Any:
        return self._of(name, default, bool)

    def list(self, name: str, default: Any = None) -> Any:
        return self._of(name, default, list)

    def object(self, name: str) -> Fields | None:
        found = self._of(name, None, dict)
        return None if found is None else Fields(found, self.path(name))

    def whole(self, name: str, default: Any, least: int, most: int | None = None) -> Any:
        value = self._left.pop(name, default)
        if value is default:
            return default
        if type(value) is float and math.isfinite(value) and value == int(value):
            value = int(value)
        if type(value) is not int or value < least or (most is not None and value > most):
            bound = f"{least} or more" if most is None else f"{least} … {most}"
            self.refuse(name, f"is {shown(value)}; give a whole number, {bound}")
        return value

    def number(self, name: str, default: Any, least: float, most: float) -> Any:
        value = self._left.pop(name, default)
        if value is default:
            return default
        if type(value) not in (int, float) or not least <= value <= most:
            self.refuse(name, f"is {shown(value)}; give a number, {least:g} … {most:g}")
        return float(value)

    def one_of(self, name: str, default: Any, choices: Sequence[str]) -> Any:
        value = self._left.pop(name, default)
        if value is not default and value not in choices:
            self.refuse(name, f"is {shown(value)}; give one of {', '.join(choices)}")
        return value

    def ignore(self, names: Iterable[str]) -> None:
        """Takes fields that change nothing here."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """Takes a field that is served with these values alone."""
        if name in self._left and (value := self._left.pop(name)) not in allowed:
            self.refuse(name, f"is {shown(value)}, which is not served: {why}", "unsupported_value")

    def end(self) -> None:
        """Raises RequestError where a field is left that nobody took."""
        for name in self._left:
            self.refuse(name, "is no field that this server knows; leave it out", "unknown_field")

    def refuse(self, name: str, text: str, code: str = "invalid_value") -> None:
        """Raises RequestError about a field."""
        path = self.path(name if len(name) <= 60 else f"{name[:57]}...")
        raise RequestError(f"{path} {text}", param=path, code=code)

    def _of(self, name: str, default: Any, of: type) -> Any:
        value = self._left.pop(name, default)
        if value is not default and type(value) is not of:
            self.refuse(name, f"is {kind(value)}; give {KINDS[of]}")
        return value


def kind(value: Any) -> str:
    """Returns what JSON calls a value."""
    return KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Returns a value as a message shows it: a short one as it is, else its kind."""
    if isinstance(value, str | bool | int | float) and len(text := repr(value)) <= 40:
        return text
    return kind(value)
