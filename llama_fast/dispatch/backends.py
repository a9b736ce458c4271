"""The backends that there are, in which order they are asked, and what is asked for instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from .overrides import function_mode_observes, needs_dispatcher
from .types import Backend, Request

ORDER = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
BACKENDS = ("cpu", "cuda", "triton", "eager")
# Where the rows of a backend are: imported at the first call of an op.
_MODULES = {name: f"..backends.{name}" for name in BACKENDS if name != "eager"}

# Takes an op, a backend's name and its launcher, and returns a launcher.
Wrapper = Callable[[Any, str, Callable[..., Any]], Callable[..., Any]]

_ANY = Request()
_backends: dict[str, Backend] = {}
_wrapper: Wrapper | None = None
_request: ContextVar[Request] = ContextVar("llama_fast_backend", default=_ANY)
current_request = _request.get
# How often the implementations that there are have changed, and what is then told.
_changes = 0
when_changed: list[Callable[[], None]] = []


def backends() -> dict[str, Backend]:
    """The registered backends by name; this package's own are imported when first asked for."""
    _load_backends()
    return _backends


def kernels() -> set[tuple[str, str]]:
    """The ops that more than their definition can serve here, each with a type of device."""
    return {
        (op, device)
        for device, order in ORDER.items()
        for name in order
        if name in backends() and not backends()[name].unavailable
        for op in backends()[name].implementations
    }


@functools.cache
def _load_backends() -> None:
    import_module("..ops", __package__)  # every op is declared before its implementations
    for module in _MODULES.values():
        import_module(module, __package__)


def register_backend(backend: Backend) -> None:
    """Adds the backend, or puts it in the place of the one of its name."""
    _backends[backend.name] = backend
    _changed()


def _changed() -> None:
    global _changes
    _changes += 1
    for tell in when_changed:
        tell()


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Inside the block, ops ask backend `name` first (`"cpu"`, `"cuda"`, `"triton"`, `"eager"`).

    With `strict=True` a call that it cannot serve raises BackendError with the reasons; otherwise
    the device's usual order follows. Holds for this thread (or task) and for the gradients of what
    it computes.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend is named {name!r}; there are {', '.join(BACKENDS)}")
    with requesting(Request(name, strict)):
        yield


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Inside the block, the request holds in this thread, as `use_backend` makes it."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


@contextmanager
def wrapped_launches(wrapper: Wrapper) -> Iterator[None]:
    """Inside the block, what serves calls is `wrapper(op, backend, launch)` instead of `launch`, in
    every thread and for gradients too: to time calls or to look at their arguments. Calls outside
    the block cost nothing more."""
    global _wrapper
    before, _wrapper = _wrapper, wrapper
    _changed()
    try:
        yield
    finally:
        _wrapper = before
        _changed()


def current_wrapper() -> Wrapper | None:
    """Returns what `wrapped_launches` was given, inside of its block."""
    return _wrapper


def observed() -> bool:
    """True while something is to see each call, of an op or of torch, as it is made: what
    `needs_dispatcher` asks for, `wrapped_launches`, or a mode of torch's functions."""
    return needs_dispatcher() or _wrapper is not None or function_mode_observes()


def launch_settings() -> tuple:
    """What launches depend on besides their arguments: what `use_backend` asks for here, which
    implementations there are, and what the backends are set to."""
    settings = (backend.settings for backend in backends().values())
    return _request.get(), _changes, *(now() for now in settings if now is not None)


def recorder(device: torch.device) -> Any:
    """What can capture a step of ops that the device's first backend serves, or None: where that
    backend has no such thing or is not asked first, or where calls are traced."""
    first = _first(device)
    if first is None or first.recorder is None or needs_dispatcher():
        return None
    return first.recorder() if _request.get().backend in (None, first.name) else None


def reserve(fresh: Tensor) -> Tensor:
    """The tensor itself, whose memory nothing has written yet, made ready for weights or a cache as
    the first backend of its device likes it."""
    first = _first(fresh.device)
    return fresh if first is None or first.reserve is None else first.reserve(fresh)


def batch_invariant_on(device: torch.device) -> AbstractContextManager[None]:
    """The context in which the bits of a row do not depend on the rows beside it; one that changes
    nothing where the first backend of the device has no such thing."""
    first = _first(device)
    return nullcontext() if first is None or not first.batch_invariant else first.batch_invariant()


def _first(device: torch.device) -> Backend | None:
    """The backend that the device's ops ask first, where it can run here."""
    backend = backends().get(ORDER.get(device.type, ("eager",))[0])
    return None if backend is None or backend.unavailable else backend
