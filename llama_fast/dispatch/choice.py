"""Which implementation serves a call of an op, and why the others do not."""

from __future__ import annotations

import re
import warnings

import torch

from ..errors import BackendError, FallbackWarning
from .arguments import device_type
from .backends import ORDER, backends, current_request, current_wrapper
from .definition import Definition
from .types import Decision, Implementation, Request, nothing

_warned: set[tuple] = set()


def order_of(op: Definition, device: str, request: Request) -> list[tuple[str, Implementation]]:
    """The implementations that exist here, in the order in which they are asked."""
    names = [] if request.strict else list(ORDER.get(device, ("eager",)))
    if request.backend is not None:
        names = [request.backend, *(name for name in names if name != request.backend)]
    rows, missing = [], []
    for name in names:
        if name == "eager":
            rows.append((name, Implementation(op.eager, nothing)))
        elif name in backends() and backends()[name].unavailable:
            missing.append(name)
        elif name in backends():
            implementation = backends()[name].implementations.get(op.name)
            if implementation is not None:
                rows.append((name, implementation))
    if rows and (request.backend in missing or names[0] != rows[0][0] == "eager"):
        _warn_unavailable(device, missing, rows[0][0])
    if current_wrapper() is not None:
        rows = [(name, _wrapped(op, name, row)) for name, row in rows]
    return rows


def _wrapped(op: Definition, backend: str, row: Implementation) -> Implementation:
    """What `wrapped_launches` asked for, which sees all arguments of a call."""
    wrapped = current_wrapper()(op, backend, row.launch)
    return row._replace(launch=lambda *args: wrapped(*op.complete(args)), plan=None)


def choose(
    op: Definition, order: list[tuple[str, Implementation]], request: Request, args: tuple
) -> Implementation:
    """The first that has no reason to refuse the call; warns of those that have one."""
    passed = []
    for name, implementation in order:
        found = implementation.unsupported(*args)
        if not found:
            _warn_fallback(op, passed, name, args[0].device)
            return implementation
        passed.append((name, found))
    raise BackendError(
        f"{op.name}: backend {request.backend!r} was asked for strictly and cannot serve "
        f"this call: {'; '.join(reasons(op, request.backend, args))}. Change the arguments, "
        "or let another backend serve it by not asking strictly."
    )


def refuse_strict(op: Definition, where: str) -> None:
    """Raises BackendError where the definition is to serve a call, as no kernel can, and another
    backend was asked for strictly."""
    request = current_request()
    if request.strict and request.backend != "eager":
        raise BackendError(
            f"{op.name}: backend {request.backend!r} was asked for strictly and cannot serve a "
            f"call {where}. Let the eager definition serve it by not asking strictly."
        )


def reasons(op: Definition, backend: str, args: tuple) -> list[str]:
    """Why the backend cannot serve the call; nothing where it can."""
    if backend == "eager":
        return []
    found = backends().get(backend)
    if found is None:
        return [f"no backend named {backend!r} is part of this installation"]
    if found.unavailable:
        return found.unavailable
    implementation = found.implementations.get(op.name)
    if implementation is None:
        return [f"the {backend} backend has no {op.name}"]
    return implementation.unsupported(*args)


def decide(op: Definition, args: tuple) -> Decision:
    """Returns what serves the call now, and the reasons of every other backend of its device."""
    device = device_type(args)
    names = (current_request().backend, *ORDER.get(device, ("eager",)))
    why = {name: reasons(op, name, args) for name in names if name is not None}
    chosen = next(name for name, found in why.items() if not found)
    how = ""
    if chosen != "eager":
        implementation = backends()[chosen].implementations[op.name]
        how = implementation.how(*args) if implementation.how else ""
    return Decision(op.label(*args), device, chosen, why, how)


# In a reason, not in a name as float32 is one.
_NUMBER = re.compile(r"(?<![\w.])\d+(\.\d+)?")


def _warn_fallback(op: Definition, passed: list, chosen: str, device: torch.device) -> None:
    """Warns of the backends that a call has passed, once for each kind of reason: the next prompt's
    other length makes no other kind. What a backend has against a device is said once for all ops.
    """
    for name, found in passed:
        of_device = backends()[name].refuses
        refused = of_device is not None and found == of_device(device)
        why = "; ".join(found)
        kind = str(device) if refused else op.name, name, _NUMBER.sub("#", why)
        if kind in _warned:
            continue
        _warned.add(kind)
        said = f"{op.name} runs on the {chosen} backend, because {name} cannot serve this call"
        if refused:
            said = f"ops on {device} tensors do without the {name} backend, which cannot serve them"
        warnings.warn(f"{said}: {why}", FallbackWarning, stacklevel=5)


def _warn_unavailable(device: str, missing: list[str], chosen: str) -> None:
    """Warns, once, that backends of a device cannot be used here at all, in the loader's words."""
    if not missing or (device, *missing) in _warned:
        return
    _warned.add((device, *missing))
    why = "; ".join(f"{name}: {'; '.join(backends()[name].unavailable)}" for name in missing)
    warnings.warn(
        f"ops on {device} tensors run on the {chosen} backend, because none before it can be used "
        f"here: {why}",
        FallbackWarning,
        stacklevel=7,
    )
