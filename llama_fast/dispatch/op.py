"""Which implementation serves a call, and why.

An `Op` is declared once, in `llama_fast/ops/<stem>.py`: schema, checks, eager reference, fake,
gradient, cost, cases. A `Backend` (one file in `llama_fast/backends/`) adds rows of
`Implementation`s. For each call the registry walks the order of the tensor's device type and takes
the first implementation that has no reason to refuse.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from operator import itemgetter
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BackendError, FallbackWarning, GradientError, ShapeError
from .schema import fake_of, schema_of
from .signature import has_memory, kind_of_call

ORDER = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
# Kinds of calls that an op remembers at most.
KNOWN_CALLS = 1024
BACKENDS = ("cpu", "cuda", "triton", "eager")
# Where the rows of a backend are: imported at the first call of an op.
_MODULES = {name: f"..backends.{name}" for name in BACKENDS if name != "eager"}

_library = torch.library.Library("llama_fast", "DEF")


class Implementation(NamedTuple):
    """One op on one backend.

    `launch` takes the op's arguments and returns its outputs; trailing arguments that have a
    default may be left out. `unsupported` takes all arguments and returns sentences that say why it
    cannot serve them; an empty list means it can. `how`, where there is a choice of ways, says in a
    few words which one it takes. `prepare`, where there is one, takes the arguments of a call and
    returns what launches all calls of that kind: with as many arguments, tensors of these shapes,
    strides, dtypes and devices, and these other arguments.
    """

    launch: Callable[..., Any]
    unsupported: Callable[..., list[str]]
    how: Callable[..., str] | None = None
    prepare: Callable[..., Callable[..., Any]] | None = None


@dataclass
class Backend:
    """A family of kernels: why it cannot run here at all (or nothing), and its rows by op name.

    `recorder`, where there is one, makes a `captured_step.Capturer` for steps of its ops.
    `settings`, where there is one, says what its launches depend on besides their arguments.
    `reserve`, where there is one, readies fresh memory that weights or a cache are to fill.
    """

    name: str
    unavailable: list[str]
    implementations: dict[str, Implementation]
    recorder: Callable[[], Any] | None = None
    settings: Callable[[], tuple] | None = None
    reserve: Callable[[Tensor], Tensor] | None = None


class Cost(NamedTuple):
    """What a call must at least move and compute: bytes to and from memory, FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """Arguments for one test or benchmark of an op: `make(generator, dtype, device)` → args."""

    name: str
    make: Callable[..., tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def __str__(self) -> str:
        return self.name


class Request(NamedTuple):
    """What `use_backend` asked for."""

    backend: str | None = None
    strict: bool = False


class Decision(NamedTuple):
    """Which backend serves a call of an op (its `label`), and for every other one in line the
    reasons why not; how, where the backend has several ways."""

    op: str
    device: str
    chosen: str
    reasons: dict[str, list[str]]
    how: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen}"]
        for backend, reasons in self.reasons.items():
            said = "; ".join(reasons) if reasons else "would serve this call"
            if backend == self.chosen:
                said = " ".join(filter(None, ("serves this call", self.how)))
            lines.append(f"  {backend}: {said}")
        return "\n".join(lines)


_ANY = Request()
# What a call may have where its schema has numbers, as its kind holds them by value.
_PLAIN_NUMBERS = (float, int, bool, NoneType)
# What torch.autocast casts, and how torch's dispatcher reaches it.
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(
    torch._C.DispatchKey.AutocastCUDA
)

OPS: dict[str, Op] = {}
_backends: dict[str, Backend] = {}
_wrapper: Callable[[Op, str, Callable[..., Any]], Callable[..., Any]] | None = None
_request: ContextVar[Request] = ContextVar("llama_fast_backend", default=_ANY)
_warned: set[tuple] = set()
# How often the implementations that there are have changed.
_changes = 0


def backends() -> dict[str, Backend]:
    """The registered backends by name; this package's own are imported when first asked for."""
    _load_backends()
    return _backends


@functools.cache
def _load_backends() -> None:
    import_module("..ops", __package__)  # every op is declared before its implementations
    for module in _MODULES.values():
        import_module(module, __package__)


def register_backend(backend: Backend) -> None:
    _backends[backend.name] = backend
    _forget_orders()


@dataclass(eq=False)
class Op:
    """A named operation with one definition and several interchangeable implementations.

    name     `torch.ops.llama_fast.<name>`; also the stem of every file that belongs to it
    check    raises ShapeError for arguments that no backend may be given
    eager    the reference in plain PyTorch: specification, fallback and test oracle. Its annotated
             signature is the op's schema
    fake     shapes and dtypes of the results, for tracing; by default found by running `eager` on
             the meta device
    writes   names of the arguments that a call writes
    save     (inputs, output) → what the gradient needs: tensors, and anything else
    gradient (saved tensors, ctx scalars, which inputs need one, *gradients of the outputs) → a
             gradient for each input or None
    constants  names of float arguments that have no gradient
    forward_only  variants of an op with a gradient that have none
    non_differentiable  how many of the last results have no gradient: they are for `save` alone
    gradient_in_forward  whether the forward pass makes the gradients, where they are asked for
    grad_alternative  the op to use where a gradient is needed, for one that writes and has none
    autocast  what torch.autocast makes of its float arguments, constants and what it writes apart:
             "lower": autocast's dtype; "widest": the widest of theirs, or that of what it writes;
             "": nothing. Inside the op autocast is off, as it is in torch's own
    cost     arguments → Cost
    cases    () → list[Case]; absent on an op that is only the backward of another
    variant  arguments → which of the op's forms they ask for, in words: "swiglu int8", or none
    at_model_size  (ops.model_inputs.ModelInputs) → what a model calls the op with: by a name such
             as "linear head int8", functions that make the arguments
    """

    name: str
    check: Callable[..., None]
    eager: Callable[..., Any]
    fake: Callable[..., Any] | None = None
    writes: tuple[str, ...] = ()
    save: Callable[..., tuple] | None = None
    gradient: Callable[..., tuple] | None = None
    constants: tuple[str, ...] = ()
    forward_only: tuple[str, ...] = ()
    non_differentiable: int = 0
    gradient_in_forward: bool = False
    grad_alternative: str = ""
    autocast: str = ""
    cost: Callable[..., Cost] | None = None
    cases: Callable[[], list[Case]] | None = None
    variant: Callable[..., str] | None = None
    at_model_size: Callable[[Any], dict[str, Callable[[], tuple]]] | None = None
    _orders: dict[tuple, list[tuple[str, Implementation]]] = field(default_factory=dict)
    _known: dict[tuple, Callable[..., Any]] = field(default_factory=dict)
    _writes_of: dict[int, Callable[[tuple], tuple]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self
        self.fake = self.fake or fake_of(self.eager)
        _library.define(self.name + schema_of(self.eager, self.writes))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self.run, key)
            _library.impl(self.name, self._run_autocast, f"Autocast{key}")
        self._torch_op = getattr(torch.ops.llama_fast, self.name).default
        arguments = self._torch_op._schema.arguments
        self._defaults = tuple(argument.default_value for argument in arguments)
        self._numbers = [
            i for i, a in enumerate(arguments) if not re.search("Tensor|str", str(a.type))
        ]
        self._constants = [i for i, a in enumerate(arguments) if a.name in self.constants]
        self._written = [i for i, a in enumerate(arguments) if a.name in self.writes]
        torch.library.register_fake(f"llama_fast::{self.name}", self._run_fake, lib=_library)
        if self.gradient is not None:
            torch.library.register_autograd(
                f"llama_fast::{self.name}",
                self._backward,
                setup_context=self._setup_context,
                lib=_library,
            )
        elif self._written:
            _library.impl(self.name, self._refuse_gradient, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Runs the op. Goes through torch's dispatcher only where that is needed: to trace, to
        record a gradient, or for tensor subclasses; the direct call costs a tenth as much."""
        if needs_dispatcher():
            if not torch.compiler.is_compiling() and transformed():
                return self._transformed(*args)
            return self._torch_op(*self._with_plain_numbers(args))
        kind = kind_of_call(args, torch.is_grad_enabled())
        if kind is None:
            self._refuse_negated(args)
            return self._torch_op(*self._with_plain_numbers(args))
        if self._written:
            self._count_writes(args)
        key = (_request.get(), kind)
        try:
            launch = self._known.get(key)
        except TypeError:  # an argument that cannot be hashed is of no type that an op takes
            launch = None
        if launch is None:
            launch = self._learn(key, args)
        return launch(*args)

    def label(self, *args: Any) -> str:
        """Returns the name and the variant that the arguments ask for: "linear swiglu int8"."""
        if self.variant is None:
            return self.name
        return f"{self.name} {self.variant(*self._complete(args))}".rstrip()

    def has_gradient(self, *args: Any) -> bool:
        if self.gradient is None:
            return False
        return not (self.forward_only and self.variant(*args) in self.forward_only)

    def run(self, *args: Any) -> Any:
        """Checks the arguments, chooses an implementation and launches it; no autograd."""
        args = self._complete(args)
        self._check_memory(args)
        self.check(*args)
        return self._choose(args).launch(*args)

    def _transformed(self, *args: Any) -> Any:
        """What torch.func's transforms and forward-mode gradients are taken of: the definition,
        since it is made of what torch can transform. torch's dispatcher would refuse an op with a
        gradient of its own, or take its tangents for zero."""
        args = self._complete(args)
        self._check_tensors(args)
        self.check(*args)
        request = _request.get()
        if request.strict and request.backend != "eager":
            raise BackendError(
                f"{self.name}: backend {request.backend!r} was asked for strictly and cannot serve "
                "a call inside of a torch.func transform or a forward-mode gradient. Let the "
                "eager definition serve it by not asking strictly."
            )
        return self.eager(*args)

    def _learn(self, key: tuple, args: tuple) -> Callable[..., Any]:
        """The launcher for a kind of call that `check` lets pass. It is kept: checks and limits
        depend on shapes, strides, dtypes, devices and the request alone (not on addresses or
        values), and a model repeats few kinds of calls. A fallback is not kept, so that it warns as
        it should; nor is a call with a number that is not Python's own, whose value is no part of
        its kind."""
        plain = self._with_plain_numbers(args)
        if plain is not args:
            return lambda *args: self(*plain)
        whole = self._complete(args)
        self._check_tensors(whole)
        self.check(*whole)
        implementation = self._choose(whole)
        if len(self._known) >= KNOWN_CALLS:
            self._known.clear()
        launch = implementation.launch
        if implementation is self._orders[_device_type(args), _request.get()][0][1]:
            if implementation.prepare is not None:
                launch = implementation.prepare(*args)
            self._known[key] = launch
        return launch

    def explain(self, *args: Any) -> Decision:
        args = self._with_plain_numbers(self._complete(args))
        self._check_tensors(args)
        self.check(*args)
        device = _device_type(args)
        reasons = {}
        for name in (_request.get().backend, *ORDER.get(device, ("eager",))):
            if name is not None and name not in reasons:
                reasons[name] = self._reasons(name, args)
        chosen = next(name for name, why in reasons.items() if not why)
        implementation = None
        if chosen != "eager":
            implementation = backends()[chosen].implementations[self.name]
        how = implementation.how(*args) if implementation and implementation.how else ""
        return Decision(self.label(*args), device, chosen, reasons, how)

    def _check_tensors(self, args: tuple) -> None:
        """Tensors stand where the schema has them; torch's dispatcher sees to it for itself."""
        for arg, argument in zip(args, self._torch_op._schema.arguments, strict=True):
            absent = arg is None and str(argument.type) == "Optional[Tensor]"
            if "Tensor" in str(argument.type) and not (isinstance(arg, Tensor) or absent):
                raise TypeError(
                    f"{self.name}: {argument.name} is a {type(arg).__name__}; it must be a "
                    "torch.Tensor: make one with torch.as_tensor"
                )

    def _refuse_negated(self, args: tuple) -> None:
        """torch's dispatcher resolves negated arguments, but for those that an op writes."""
        for i in self._written:
            if i < len(args) and isinstance(args[i], Tensor) and args[i].is_neg():
                raise ShapeError(
                    f"{self.name}: {self._torch_op._schema.arguments[i].name} is a view of its "
                    "memory with the other sign, and the op writes it: give a tensor without, as "
                    ".resolve_neg() makes one"
                )

    def _check_memory(self, args: tuple) -> None:
        for arg, argument in zip(args, self._torch_op._schema.arguments, strict=False):
            if isinstance(arg, Tensor) and not has_memory(arg):
                raise ShapeError(
                    f"{self.name}: {argument.name} has no memory: its storage was freed, as FSDP "
                    "does between forwards. Call the op inside the module's forward, or gather the "
                    "parameters first"
                )

    def _with_plain_numbers(self, args: tuple) -> tuple:
        """The arguments, with a number of Python where the schema has one and something else was
        given: a tensor of one element, say, or a number of numpy. It is read in every call."""
        numbers = {
            i: self._plain_number(i, args[i])
            for i in self._numbers
            if i < len(args) and type(args[i]) not in _PLAIN_NUMBERS
        }
        return tuple(numbers.get(i, arg) for i, arg in enumerate(args)) if numbers else args

    def _plain_number(self, index: int, value: Any) -> Any:
        argument = self._torch_op._schema.arguments[index]
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value  # a trace's
        if isinstance(value, Tensor):
            if torch.is_grad_enabled() and value.requires_grad:
                raise GradientError(
                    f"{self.name}: {argument.name} requires a gradient, and is a constant here: "
                    f"pass {argument.name}.detach()"
                )
            if value.numel() == 1:
                value = value.item()
        elif type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
            value = value.item()
        if kind == "bool" and isinstance(value, int):
            return bool(value)
        if isinstance(value, int) or (isinstance(value, float) and kind == "float"):
            return {"int": int, "float": float}[kind](value)
        raise TypeError(
            f"{self.name}: {argument.name} is a {type(value).__name__}; it must be "
            f"{'an' if kind == 'int' else 'a'} {kind}, or a tensor of one element that holds one"
        )

    def forget_order(self) -> None:
        self._orders.clear()
        self._known.clear()

    def _choose(self, args: tuple) -> Implementation:
        request = _request.get()
        key = (_device_type(args), request)
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = self._order(*key)
        for position, (_, implementation) in enumerate(order):
            reasons = implementation.unsupported(*args)
            if not reasons:
                if position:
                    self._warn_fallback(order[:position], order[position][0], args)
                return implementation
        raise BackendError(
            f"{self.name}: backend {request.backend!r} was asked for strictly and cannot serve "
            f"this call: {'; '.join(self._reasons(request.backend, args))}. Change the arguments, "
            "or let another backend serve it by not asking strictly."
        )

    def _order(self, device: str, request: Request) -> list[tuple[str, Implementation]]:
        """The implementations that exist here, in the order in which they are asked."""
        names = [] if request.strict else list(ORDER.get(device, ("eager",)))
        if request.backend is not None:
            names = [request.backend, *(name for name in names if name != request.backend)]
        rows, missing = [], []
        for name in names:
            if name == "eager":
                rows.append((name, Implementation(self.eager, nothing)))
            elif name in backends() and backends()[name].unavailable:
                missing.append(name)
            elif name in backends():
                implementation = backends()[name].implementations.get(self.name)
                if implementation is not None:
                    rows.append((name, implementation))
        if rows and (request.backend in missing or names[0] != rows[0][0] == "eager"):
            _warn_unavailable(device, missing, rows[0][0])
        if _wrapper is not None:
            rows = [
                (n, i._replace(launch=self._wrapped(n, i.launch), prepare=None)) for n, i in rows
            ]
        return rows

    def _wrapped(self, backend: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        """What `wrapped_launches` asked for, which sees all arguments of a call."""
        wrapped = _wrapper(self, backend, launch)
        return lambda *args: wrapped(*self._complete(args))

    def _reasons(self, name: str, args: tuple) -> list[str]:
        if name == "eager":
            return []
        backend = backends().get(name)
        if backend is None:
            return [f"no backend named {name!r} is part of this installation"]
        if backend.unavailable:
            return backend.unavailable
        implementation = backend.implementations.get(self.name)
        if implementation is None:
            return [f"the {name} backend has no {self.name}"]
        return implementation.unsupported(*args)

    def _warn_fallback(self, passed: list, chosen: str, args: tuple) -> None:
        for name, implementation in passed:
            reasons = tuple(implementation.unsupported(*args))
            if (self.name, name, reasons) not in _warned:
                _warned.add((self.name, name, reasons))
                warnings.warn(
                    f"{self.name} runs on the {chosen} backend, because {name} cannot serve this "
                    f"call: {'; '.join(reasons)}",
                    FallbackWarning,
                    stacklevel=4,
                )

    def _complete(self, args: tuple) -> tuple:
        """Callers and torch's dispatcher leave out trailing arguments that equal their defaults."""
        return args + self._defaults[len(args) :]

    def _run_autocast(self, *args: Any) -> Any:
        args = self._complete(args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return self._torch_op(*self._autocast_arguments(args))

    def _autocast_arguments(self, args: tuple) -> tuple:
        if not self.autocast:
            return args
        floats = {
            i: arg
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor)
            and arg.dtype in _AUTOCAST_DTYPES
            and i not in self._constants
        }
        if self.autocast == "lower":
            dtype = torch.get_autocast_dtype(_device_type(args))
        else:
            deciding = [floats[i] for i in self._written if i in floats] or floats.values()
            dtype = functools.reduce(torch.promote_types, (x.dtype for x in deciding))
        return tuple(
            arg.to(dtype) if i in floats and i not in self._written else arg
            for i, arg in enumerate(args)
        )

    def _run_fake(self, *args: Any) -> Any:
        args = self._complete(args)
        self.check(*args)
        return self.fake(*args)

    def _setup_context(self, ctx: Any, inputs: tuple, output: Any) -> None:
        inputs = self._complete(inputs)
        for i in self._constants:
            if isinstance(inputs[i], Tensor) and inputs[i].requires_grad:
                name = self._torch_op._schema.arguments[i].name
                raise GradientError(
                    f"{self.name}: {name} requires a gradient, and is a constant here: "
                    f"pass {name}.detach()"
                )
        if self.non_differentiable:
            ctx.mark_non_differentiable(*output[-self.non_differentiable :])
        tensors, ctx.scalars = self.save(inputs, output)
        ctx.save_for_backward(*tensors)
        # The backward pass may run in another thread, where the request is not known.
        ctx.request = _request.get()

    def _backward(self, ctx: Any, *gradients: Tensor) -> tuple:
        token = _request.set(ctx.request)
        try:
            return self.gradient(ctx.saved_tensors, ctx.scalars, ctx.needs_input_grad, *gradients)
        finally:
            _request.reset(token)

    def _refuse_gradient(self, *args: Any) -> Any:
        """The op writes arguments, so a gradient through it would be wrong."""
        if torch.is_grad_enabled():
            for arg, argument in zip(args, self._torch_op._schema.arguments, strict=False):
                if isinstance(arg, Tensor) and arg.requires_grad:
                    raise GradientError(
                        f"{self.name} has no gradient, but {argument.name} requires one: "
                        "call it under torch.no_grad()"
                        + (f", or use {self.grad_alternative}" if self.grad_alternative else "")
                    )
        self._count_writes(args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._torch_op(*args)

    def _count_writes(self, args: tuple) -> None:
        """Tells autograd that the tensors have changed, should a gradient need their old values."""
        written_of = self._writes_of.get(len(args))
        if written_of is None:
            written_of = self._writes_of[len(args)] = _taker(self._written, len(args))
        written = written_of(args)
        if written[-1] is None:  # those that may be left out stand last
            written = tuple(x for x in written if x is not None)
        _increment_version(written)


def _warn_unavailable(device: str, missing: list[str], chosen: str) -> None:
    """Warns, once, that backends of a device cannot be used here at all, in the loader's words."""
    if not missing or (device, *missing) in _warned:
        return
    _warned.add((device, *missing))
    reasons = "; ".join(f"{n}: {'; '.join(backends()[n].unavailable)}" for n in missing)
    warnings.warn(
        f"ops on {device} tensors run on the {chosen} backend, because none before it can be used "
        f"here: {reasons}",
        FallbackWarning,
        stacklevel=7,
    )


def _taker(indices: list[int], count: int) -> Callable[[tuple], tuple]:
    """Returns what takes the arguments of these indices out of `count` of them."""
    indices = [i for i in indices if i < count]
    return itemgetter(*indices) if len(indices) > 1 else lambda args: (args[indices[0]],)


def recorder(device: torch.device) -> Any:
    """What can capture a step of ops that the device's first backend serves, or None: where that
    backend has no such thing or is not asked first, or where calls are traced."""
    first = ORDER.get(device.type, ("eager",))[0]
    backend = backends().get(first)
    if backend is None or backend.unavailable or backend.recorder is None or needs_dispatcher():
        return None
    return backend.recorder() if _request.get().backend in (None, first) else None


def launch_settings() -> tuple:
    """What launches depend on besides their arguments: what `use_backend` asks for here, which
    implementations there are, and what the backends are set to."""
    settings = (backend.settings for backend in backends().values())
    return _request.get(), _changes, *(now() for now in settings if now is not None)


def observed() -> bool:
    """True while something is to see each call, of an op or of torch, as it is made: what
    `needs_dispatcher` asks for, `wrapped_launches`, or a mode of torch's functions. A default
    device is such a mode too, but leaves calls with tensors alone."""
    return (
        needs_dispatcher()
        or _wrapper is not None
        or any(
            type(_function_mode(index)) is not DeviceContext
            for index in range(_count_function_modes())
        )
    )


def reserve(fresh: Tensor) -> Tensor:
    """The tensor itself, whose memory nothing has written yet, made ready for weights or a cache as
    the first backend of its device likes it."""
    backend = backends().get(ORDER.get(fresh.device.type, ("eager",))[0])
    if backend is None or backend.unavailable or backend.reserve is None:
        return fresh
    return backend.reserve(fresh)


def nothing(*args: Any) -> list[str]:
    return []


# Every call of an op asks these, and to find them would take as long as they do.
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_forward_ad = torch.autograd.forward_ad
_count_function_modes = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at
_increment_version = torch.autograd.graph.increment_version


def needs_dispatcher() -> bool:
    """True while something traces or transforms calls: torch.compile, a mode, autocast, or what
    `transformed` asks for."""
    return (
        torch.compiler.is_compiling()
        or _is_autocast_enabled()
        or _count_dispatch_modes() > 0
        or _functorch_level() is not None  # as in `transformed`
        or _forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """True inside of torch.func's grad, vmap, jvp and their like, and where tangents may be carried
    along (torch.autograd.forward_ad)."""
    return _functorch_level() is not None or _forward_ad._current_level >= 0


def _device_type(args: tuple) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.is_cpu:
                return "cpu"
            return "cuda" if arg.is_cuda else arg.device.type
    raise TypeError("an op was called without a tensor")


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Inside the block, ops ask backend `name` first (`"cpu"`, `"cuda"`, `"triton"`, `"eager"`).

    With `strict=True` a call that it cannot serve raises BackendError with the reasons; otherwise
    the device's usual order follows. Holds for this thread (or task) and for the gradients of what
    it computes.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend is named {name!r}; there are {', '.join(BACKENDS)}")
    token = _request.set(Request(name, strict))
    try:
        yield
    finally:
        _request.reset(token)


@contextmanager
def wrapped_launches(
    wrapper: Callable[[Op, str, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Inside the block, what serves calls is `wrapper(op, backend, launch)` instead of `launch`, in
    every thread and for gradients too: to time calls or to look at their arguments. Calls outside
    the block cost nothing more."""
    global _wrapper
    before, _wrapper = _wrapper, wrapper
    _forget_orders()
    try:
        yield
    finally:
        _wrapper = before
        _forget_orders()


def _forget_orders() -> None:
    global _changes
    _changes += 1
    for op in OPS.values():
        op.forget_order()


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Inside the block, the decision of every call of an op is added to the list that it yields.

    Meant for a step at the end of some work, to say what served it: calls go through torch's
    dispatcher while they are recorded, which costs them some microseconds, and cost nothing more
    otherwise.
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.decisions


class DispatchMode(TorchDispatchMode):
    """torch's, but its first call does not import torch's compiler: that takes a second and some
    0.1 GB, and only calls that are being compiled need it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == _library.ns:
            op = OPS[function._opname]
            self.decisions.append(op.explain(*op._complete(args)))
        return function(*args, **(kwargs or {}))


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Returns which backend would serve `op(*args)` now, and why each other one does not.

    `print(llama_fast.explain("attention", q, k, v))` shows it; the result's fields are `chosen`,
    `reasons` (every backend → list of sentences, empty where it could serve the call) and `how` (a
    few words, or none). Raises BackendError for an op that does not exist.
    """
    backends()  # importing them declares the ops
    if op not in OPS:
        raise BackendError(f"no op is named {op!r}; there are {', '.join(sorted(OPS))}")
    decision = OPS[op].explain(*_positional(OPS[op], args, kwargs))
    elsewhere = {
        name: [f"it serves tensors on {_devices_of(name)}; these are on {decision.device}"]
        for name in BACKENDS
        if name not in decision.reasons
    }
    return decision._replace(reasons={**decision.reasons, **elsewhere})


def _devices_of(backend: str) -> str:
    return " or ".join(device for device, order in ORDER.items() if backend in order)


def _positional(op: Op, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The op's arguments in schema order, with its defaults."""
    schema = op._torch_op._schema.arguments
    names = {argument.name for argument in schema}
    if unknown := set(kwargs) - names:
        raise TypeError(f"{op.name} has no argument {', '.join(sorted(unknown))}")
    values = list(args)
    for argument in schema[len(args) :]:
        if argument.name in kwargs:
            values.append(kwargs[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
        else:
            raise TypeError(f"{op.name} needs the argument {argument.name!r}")
    return tuple(values)
