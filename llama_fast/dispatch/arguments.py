"""The arguments of an op as its schema has them, and what is refused before a backend sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError, ShapeError
from .signature import has_memory

# What a call may have where its schema has numbers, as its signature holds them by value.
_PLAIN_NUMBERS = (float, int, bool, NoneType)
_increment_version = torch.autograd.graph.increment_version


class Arguments:
    """What the schema of an op says of its arguments.

    constants  names of float arguments that have no gradient
    writes     names of the arguments that a call writes
    """

    def __init__(self, op: str, schema: Any, constants: tuple[str, ...], writes: tuple[str, ...]):
        self.op = op
        self.schema = schema
        self.names = [argument.name for argument in schema]
        self.constants = [i for i, name in enumerate(self.names) if name in constants]
        self.written = [i for i, name in enumerate(self.names) if name in writes]
        self._defaults = tuple(argument.default_value for argument in schema)
        self.numbers = [i for i, a in enumerate(schema) if not re.search("Tensor|str", str(a.type))]
        self._writes_of: dict[int, Callable[[tuple], tuple]] = {}

    def complete(self, args: tuple) -> tuple:
        """Callers and torch's dispatcher leave out trailing arguments that equal their defaults."""
        return args + self._defaults[len(args) :]

    def positional(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The arguments in schema order, with their defaults."""
        if unknown := set(kwargs) - set(self.names):
            raise TypeError(f"{self.op} has no argument {', '.join(sorted(unknown))}")
        values = list(args)
        for argument in self.schema[len(args) :]:
            if argument.name in kwargs:
                values.append(kwargs[argument.name])
            elif argument.has_default_value():
                values.append(argument.default_value)
            else:
                raise TypeError(f"{self.op} needs the argument {argument.name!r}")
        return tuple(values)

    def check_tensors(self, args: tuple) -> None:
        """Tensors stand where the schema has them; torch's dispatcher sees to it for itself."""
        for arg, argument in zip(args, self.schema, strict=True):
            absent = arg is None and str(argument.type) == "Optional[Tensor]"
            if "Tensor" in str(argument.type) and not (isinstance(arg, Tensor) or absent):
                raise TypeError(
                    f"{self.op}: {argument.name} is a {type(arg).__name__}; it must be a "
                    "torch.Tensor: make one with torch.as_tensor"
                )

    def check_memory(self, args: tuple) -> None:
        for arg, name in zip(args, self.names, strict=False):
            if isinstance(arg, Tensor) and not has_memory(arg):
                raise ShapeError(
                    f"{self.op}: {name} has no memory: its storage was freed, as FSDP does between "
                    "forwards. Call the op inside the module's forward, or gather the parameters "
                    "first"
                )

    def refuse_negated(self, args: tuple) -> None:
        """torch's dispatcher resolves negated arguments, but for those that an op writes."""
        for i in self.written:
            if i < len(args) and isinstance(args[i], Tensor) and args[i].is_neg():
                raise ShapeError(
                    f"{self.op}: {self.names[i]} is a view of its memory with the other sign, and "
                    "the op writes it: give a tensor without, as .resolve_neg() makes one"
                )

    def refuse_gradients_of_constants(self, args: tuple) -> None:
        for i in self.constants:
            if isinstance(args[i], Tensor) and args[i].requires_grad:
                raise self._constant(i)

    def _constant(self, index: int) -> GradientError:
        name = self.names[index]
        return GradientError(
            f"{self.op}: {name} requires a gradient, and is a constant here: pass {name}.detach()"
        )

    def that_need_a_gradient(self, args: tuple) -> Iterator[str]:
        """Names of the arguments of which a gradient is to be recorded now."""
        if torch.is_grad_enabled():
            for arg, name in zip(args, self.names, strict=False):
                if isinstance(arg, Tensor) and arg.requires_grad:
                    yield name

    def with_plain_numbers(self, args: tuple) -> tuple:
        """The arguments, with a number of Python where the schema has one and something else was
        given: a tensor of one element, say, or a number of numpy. It is read in every call."""
        numbers = {
            i: self._plain_number(i, args[i])
            for i in self.numbers
            if i < len(args) and type(args[i]) not in _PLAIN_NUMBERS
        }
        return tuple(numbers.get(i, arg) for i, arg in enumerate(args)) if numbers else args

    def _plain_number(self, index: int, value: Any) -> Any:
        kind = str(self.schema[index].type).removeprefix("Optional[").removesuffix("]")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value  # a trace's
        if isinstance(value, Tensor):
            if torch.is_grad_enabled() and value.requires_grad:
                raise self._constant(index)
            if value.numel() == 1:
                value = value.item()
        elif type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
            value = value.item()
        if kind == "bool" and isinstance(value, int):
            return bool(value)
        if isinstance(value, int) or (isinstance(value, float) and kind == "float"):
            return {"int": int, "float": float}[kind](value)
        raise TypeError(
            f"{self.op}: {self.names[index]} is a {type(value).__name__}; it must be "
            f"{'an' if kind == 'int' else 'a'} {kind}, or a tensor of one element that holds one"
        )

    def count_writes(self, args: tuple) -> None:
        """Tells autograd that the tensors have changed, should a gradient need their old values."""
        written_of = self._writes_of.get(len(args))
        if written_of is None:
            written_of = self._writes_of[len(args)] = _taker(self.written, len(args))
        written = written_of(args)
        if written[-1] is None:  # those that may be left out stand last
            written = tuple(x for x in written if x is not None)
        try:
            _increment_version(written)
        except RuntimeError:  # torch.fx's proxies stand for tensors
            _increment_version(tuple(x for x in written if isinstance(x, Tensor)))


def _taker(indices: list[int], count: int) -> Callable[[tuple], tuple]:
    """Returns what takes the arguments of these indices out of `count` of them."""
    indices = [i for i in indices if i < count]
    return itemgetter(*indices) if len(indices) > 1 else lambda args: (args[indices[0]],)


def device_type(args: tuple) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.is_cpu:
                return "cpu"
            return "cuda" if arg.is_cuda else arg.device.type
    raise TypeError("an op was called without a tensor")
