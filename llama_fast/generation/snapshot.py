"""Whether a model is still what it was when its decode step was captured.

A replay calls no Python, so it stands for the step only as long as all that the step is made of is
the same: modules and their classes, the functions that they call, hooks, attributes such as `eps`,
and where the weights and the cache lie in memory. All of it is compared before every replay, by
identity: no change has to announce itself, so none can be forgotten. What lies in that memory may
change, since a replay reads it there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

from .. import ops
from ..dispatch import launch_settings
from ..nn.kv_cache import KVCache

try:
    from .. import _cpu
except ImportError:
    _cpu = None

PACKAGE = __package__.partition(".")[0]
# Where functions are defined that do nothing a replay would leave out.
# torch.compile, once used, counts the modules that are made (mutation_guard).
HOMES = (
    PACKAGE,
    "torch.nn",
    "torch.utils._contextlib",
    "torch._dynamo.mutation_guard",
    "contextlib",
)
# Dicts of a module that its call looks into, and hooks of all modules; they are empty of hooks
# where a step is replayed. Backward hooks have no part in a step.
OF_A_MODULE = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")

# Methods of torch's classes that a step comes by.
OF_A_CALL = {
    *("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "forward"),
    *("__getattr__", "__setattr__", "__iter__", "__getitem__", "__len__"),
}

# A dict, or a class in the place of its own.
_Dict = dict[str, Any] | type


class Snapshot:
    """Of a model and the cache that its step appends to.

    plain  whether Python does nothing in a step that a replay would have to repeat: all functions
           are this package's and torch's, no module has hooks, and tensors are dense ones of no
           subclass

    Keeps what it has seen, but neither the model itself nor what only the model has: a model may
    keep its steps.
    """

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        modules = list(model.modules())
        self._modules, self._types = modules[1:], [*map(type, modules)]
        classes = _classes(self._types)
        self._of_model = {name: _reference(x) for name, x in vars(model).items()}
        dicts = [
            *_inner_dicts(model),
            *chain.from_iterable((vars(x), *_inner_dicts(x)) for x in self._modules),
            *_shared_dicts(classes),
        ]
        self._cache = [(name, x) for name, x in vars(cache).items() if [*_tensors(x)]]
        values = [*vars(model).values(), *_values(dicts), *(x for _, x in self._cache)]
        tensors = [*_tensors(values)]
        self._unchanged = unchanged(dicts, tensors)
        self._settings = _settings(cache)
        self.plain = (
            not any(vars(torch_module)[name] for name in OF_ALL_MODULES)
            and not any(map(_has_hooks_or_overrides, modules))
            and all(map(_is_dense, tensors))
            and all(map(_is_known, _functions(classes)))
            and all(_is_known(getattr(ops, name)) for name in ops.__all__)
        )

    def holds(self, model: nn.Module, cache: KVCache) -> bool:
        """Whether they are what they were."""
        return (
            self._unchanged()
            and vars(model).keys() == self._of_model.keys()
            and all(self._of_model[name]() is x for name, x in vars(model).items())
            and [type(model), *map(type, self._modules)] == self._types
            and all(getattr(cache, name, None) is x for name, x in self._cache)
            and _settings(cache) == self._settings
        )


def unchanged(dicts: list[_Dict], tensors: list[Tensor]) -> Callable[[], bool]:
    """What says whether the dicts hold the very objects that they hold now, and the tensors lie
    where and as they do; in C++ where torch and the build allow it."""
    found = None if _cpu is None else _cpu.unchanged(Tensor, dicts, tensors)
    return seen_by_python(dicts, tensors) if found is None else found


def seen_by_python(dicts: list[_Dict], tensors: list[Tensor]) -> Callable[[], bool]:
    seen, places = [*_values(dicts)], [*map(_place, tensors)]

    def holds() -> bool:
        values = [*_values(dicts)]
        same = len(values) == len(seen) and all(map(is_, values, seen))
        return same and [*map(_place, tensors)] == places

    return holds


def _values(dicts: Iterable[_Dict]) -> Iterator[Any]:
    for each in dicts:
        yield from (vars(each) if isinstance(each, type) else each).values()


def _inner_dicts(module: nn.Module) -> Iterator[_Dict]:
    return (vars(module)[name] for name in OF_A_MODULE)


def _reference(x: Any) -> Callable[[], Any]:
    """A weak one, or where x takes none what keeps it: a number or a tuple, say."""
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


def _classes(types: list[type]) -> list[type]:
    """These, the cache's, and all that they inherit from."""
    bases = chain.from_iterable(x.__mro__ for x in (*types, KVCache))
    return [x for x in dict.fromkeys(bases) if x is not object]


def _shared_dicts(classes: list[type]) -> Iterator[_Dict]:
    """What the classes hold; what their functions find by name; and the hooks of all modules."""
    yield from classes
    found = {ops.__name__: vars(ops)}
    for function in _values(classes):
        names = getattr(function, "__globals__", {})
        if _is_home(names, (PACKAGE,)):
            found[names["__name__"]] = names
    yield from found.values()
    yield from (vars(torch_module)[name] for name in OF_ALL_MODULES)


def _has_hooks_or_overrides(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: by hooks, by a function of its own in the
    place of the class's, or compiled."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or getattr(module, "_compiled_call_impl", None) is not None
        or any(callable(getattr(type(module), name, None)) for name in vars(module))
    )


def _functions(classes: list[type]) -> Iterator[Any]:
    """What a call of a module may look up in these. Of torch's classes that is little, and other
    libraries add methods of their own to them (transformers: `smart_apply`)."""
    for owner in classes:
        own = _is_home({"__name__": owner.__module__}, (PACKAGE,))
        yield from (x for name, x in vars(owner).items() if own or name in OF_A_CALL)


def _is_known(value: Any) -> bool:
    """Whether a value of a class or module is a function from HOMES, or no function."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not hasattr(value, "__globals__"):
        return type(value).__module__ in ("builtins", "typing")
    while value is not None:
        if not _is_home(value.__globals__, HOMES):
            return False
        value = getattr(value, "__wrapped__", None)
    return True


def _is_home(names: Mapping[str, Any], homes: tuple[str, ...]) -> bool:
    return any(f"{names.get('__name__')}.".startswith(f"{home}.") for home in homes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_tensors, value))


def _is_dense(x: Tensor) -> bool:
    """Whether x is what its memory holds."""
    plain = type(x) in (Tensor, Parameter) and x.layout is torch.strided
    return plain and not (x.is_neg() or x.is_conj())


def _place(x: Tensor) -> tuple:
    if x.layout is not torch.strided:
        return ()
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _settings(cache: KVCache) -> tuple:
    """What launches depend on besides; a CUDA graph also holds what cuBLAS was told."""
    if not cache.lengths.is_cuda:
        return launch_settings()
    cublas = torch.backends.cuda.matmul
    return (
        *launch_settings(),
        cublas.allow_tf32,
        cublas.allow_fp16_reduced_precision_reduction,
        cublas.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
