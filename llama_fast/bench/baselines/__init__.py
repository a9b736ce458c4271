"""Who is timed beside our backends: eager, torch.compile, torch's own function, other libraries.

A baseline is a name and, for an op, a function of the op's own arguments that returns the op's own
outputs, laid out as that library likes them: turning a result back into the op's layout is a view.
Each file here is of one op: `OP`, its name; `BASELINES`, who has it in one function; `limits`, what
these cannot be asked; `written_out`, what is compiled where the definition makes its own gradients.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from ...dispatch import BACKENDS, Op, use_backend
from ...errors import BackendError
from .names import COMPILED, FORWARD_ONLY, LIBRARIES, ON_GPUS, TORCH, Call

PEERS = (*TORCH, COMPILED, *LIBRARIES)

_files = [import_module(f".{found.name}", __name__) for found in iter_modules(__path__)]
_of_op = {file.OP: file for file in _files if hasattr(file, "OP")}


def _functions(op: Op) -> dict[str, Call]:
    return getattr(_of_op.get(op.name), "BASELINES", {})


def peers(op: Op) -> list[str]:
    """Who has this op besides our backends, wherever it may run."""
    return [name for name in PEERS if name == COMPILED or name in _functions(op)]


def why_not(name: str, op: Op, args: tuple, *, gradient: bool = False) -> list[str]:
    """Why a baseline cannot be timed on this call, in sentences; nothing where it can.

    gradient  its backward pass, too
    Raises BackendError for a name that is no baseline.
    """
    if gradient and not op.has_gradient(*args):
        return [f"{op.label(*args)} has no gradient"]
    if name in BACKENDS:
        with use_backend(name):
            return op.explain(*args).reasons[name]
    if name not in PEERS:
        raise BackendError(
            f"no baseline is named {name!r}; there are {', '.join((*BACKENDS, *PEERS))}"
        )
    if name == COMPILED:
        return []
    if name not in _functions(op):
        return [f"{name} has no {op.name} in one function"]
    if variant := op.label(*args).partition(" ")[2]:
        return [f"{name} has no {op.name} {variant} in one function"]
    module, device = LIBRARIES.get(name), args[0].device
    if module is not None and importlib.util.find_spec(module) is None:
        return [f"{name} is not installed"]
    if device.type != "cuda" and (name in LIBRARIES or name in ON_GPUS):
        return [f"{name} needs a GPU, and the tensors are on {device}"]
    if gradient and name in FORWARD_ONLY:
        return [f"{name} has no gradient"]
    limits = getattr(_of_op[op.name], "limits", None)
    return [] if limits is None else limits(name, *args)


def call(name: str, op: Op) -> Call:
    """The baseline's function of the op's arguments. Our backends run strictly, and raise
    BackendError for what they cannot serve."""
    if name in BACKENDS:

        def run(*args: Any) -> Any:
            with use_backend(name, strict=True):
                return op(*args)

        return run
    if name == COMPILED:
        torch.compiler.reset()  # or it would stop compiling after a few shapes of one function
        written_out = getattr(_of_op.get(op.name), "written_out", op.eager)
        return torch.compile(written_out, dynamic=False)
    return _functions(op)[name]
