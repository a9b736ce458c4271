"""What torch.library must know of an op, read from its annotated eager definition."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

_NAMES = {Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


def schema_of(eager: Callable[..., Any], written: Sequence[str] = ()) -> str:
    """Returns "(Tensor x, float eps=1e-05) -> Tensor" for such a function.

    written  names of the arguments that a call writes
    Arguments are annotated as Tensor, bool, int, float or str, or one of them or None; the result
    as a Tensor, a tuple of some, or None of an op that only writes. Raises KeyError for another
    annotation.
    """
    hints = get_type_hints(eager)
    arguments = []
    for parameter in inspect.signature(eager).parameters.values():
        kind, optional = _argument(hints[parameter.name])
        if parameter.name in written:
            kind = f"{kind}({chr(ord('a') + written.index(parameter.name))}!)"
        text = f"{kind}{'?' * optional} {parameter.name}"
        if parameter.default is not parameter.empty:
            value = parameter.default
            text += f'="{value}"' if isinstance(value, str) else f"={value}"
        arguments.append(text)
    result = hints["return"]
    if result is types.NoneType:
        return f"({', '.join(arguments)}) -> ()"
    kinds = get_args(result) if get_origin(result) is tuple else (result,)
    results = ", ".join(_NAMES[kind] for kind in kinds)
    return f"({', '.join(arguments)}) -> {results if len(kinds) == 1 else f'({results})'}"


def _argument(hint: Any) -> tuple[str, bool]:
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
        return _NAMES[hint], True
    return _NAMES[hint], False


def fake_of(eager: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what makes results of the shapes and dtypes that `eager` gives, contiguous, and runs
    nothing: shapes are found on the meta device."""

    def fake(*args: Any) -> Any:
        like = next(arg for arg in args if isinstance(arg, Tensor))
        found = eager(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))

        def new(result: Tensor) -> Tensor:
            return like.new_empty(result.shape, dtype=result.dtype)

        return tuple(map(new, found)) if isinstance(found, tuple) else new(found)

    return fake
