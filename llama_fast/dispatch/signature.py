"""The signature of a call of an op: all that checks, limits and launchers depend on.

That is the dtypes, devices, shapes and strides of its tensors and its other arguments, but neither
addresses nor values. A model repeats few signatures, so an op keeps a plan for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    from .. import _cpu
except ImportError:
    _cpu = None


# Below it nothing lies: a tensor that seems to begin there has no memory.
LOWEST_ADDRESS = 1 if _cpu is None else _cpu.lowest_address()


def has_memory(x: Tensor) -> bool:
    """False for a tensor whose storage was freed, wherever in it the tensor began."""
    dense = x.layout is torch.strided and not x.is_meta
    return not dense or x.data_ptr() >= LOWEST_ADDRESS or not x.numel()


def read_by_python(args: tuple, grad: bool) -> Hashable | None:
    """The signature of the call, or None where it is torch's dispatcher that must see it: `grad` is
    set and a tensor requires a gradient, or one is of a class with ways of its own, is negated (as
    x.conj().imag is in the memory of x) or has no memory."""
    signature: list[Any] = []
    for arg in args:
        its_type = type(arg)
        if its_type is Tensor or its_type is Parameter:
            if (grad and arg.requires_grad) or arg.is_neg():
                return None
            if not has_memory(arg):
                return None
            signature += (arg.is_cpu or arg.device, arg.dtype, arg.shape, arg.stride())
        elif isinstance(arg, Tensor):
            return None
        else:
            signature += (its_type, arg)
    return tuple(signature)


def _reader() -> Callable[[tuple, bool], Hashable | None]:
    """Does as `read_by_python` does, in C++ where torch and the build allow it."""
    found = None if _cpu is None else _cpu.call_signatures(Tensor, Parameter, read_by_python)
    return read_by_python if found is None else found


call_signature = _reader()
