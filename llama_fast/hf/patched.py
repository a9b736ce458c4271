"""The class of a patched module: a subclass of its own that has another forward.

A module is patched by changing its `__class__`, and unpatched by changing it back: nothing is put
into the module, so it holds no reference to itself (its memory is freed when the last user lets it
go), a replica or a copy runs on its own weights, and tracers find a method where they expect one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_OWN, _FUNCTION, _HANDLE = "_llama_fast_own", "_llama_fast_function", "_llama_fast_patch"
# A forward takes the module first; None leaves the module's own.
Function = Callable[..., Any] | None
_made: dict[tuple[type, Function, Function], type] = {}


def patch_class(module: nn.Module, function: Function, handle: Function = None) -> None:
    """Gives the module `function` as its forward, and `handle(module)` as `_llama_fast_patch`."""
    module.__class__ = _subclass(type(module), function, handle)


def unpatch_class(module: nn.Module) -> None:
    module.__class__ = _without(type(module))


def is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), _OWN)


def function_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that stands in for the module's forward, if one does."""
    return getattr(type(module), _FUNCTION, None)


def own_class(module: nn.Module) -> type:
    """The module's class as it is without the patch."""
    return getattr(type(module), _OWN, type(module))


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's forward gives without the patch."""
    return own_class(module).forward(module, *args, **kwargs)


def replaced_forward(module: nn.Module) -> Any:
    """What stands in the module's own `forward` attribute, unless it is the class's own method:
    then other code has put it back there, and it changes nothing."""
    found = vars(module).get("forward")
    if (
        isinstance(found, MethodType)
        and found.__self__ is module
        and found.__func__ is type(module).forward
    ):
        return None
    return found


def _subclass(own: type, function: Function, handle: Function) -> type:
    key = (own, function, handle)
    if key in _made:
        return _made[key]
    body = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "__reduce_ex__": _reduce,
        _OWN: own,
        _FUNCTION: staticmethod(function) if function else None,
    }
    if handle is not None:
        body[_HANDLE] = property(handle)
    if function is not None:
        body["forward"] = forward = FunctionType(
            function.__code__, function.__globals__, "forward", function.__defaults__
        )
        forward.__kwdefaults__ = function.__kwdefaults__
        # generate() and trainers choose arguments by the signature of the replaced forward.
        forward.__signature__ = inspect.signature(own.forward)
    _made[key] = type(own)(own.__name__, (own,), body)
    return _made[key]


def _without(cls: type) -> type:
    """The class without the patch, also where other code has derived from the patched one."""
    if _OWN in vars(cls):
        return vars(cls)[_OWN]
    bases = tuple(_without(base) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """A copy is patched as the module is. Its class has no name of its own to be found by, so it is
    made from the three things that a pickle can name."""
    cls = type(self)
    make, args, *rest = own_class(self).__reduce_ex__(self, protocol)
    if _OWN not in vars(cls) or not args or args[0] is not cls:
        return (make, args, *rest)
    handle = vars(cls)[_HANDLE].fget if _HANDLE in vars(cls) else None
    return (_remake, (make, cls._llama_fast_own, function_of(self), handle, *args[1:]), *rest)


def _remake(make: Callable, own: type, function: Function, handle: Function, *args: Any) -> Any:
    return make(_subclass(own, function, handle), *args)
