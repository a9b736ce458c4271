"""An op and the path of its calls: straight to a launcher, or through torch's dispatcher.

An `Op` is declared once, in `llama_fast/ops/<stem>.py`: schema, checks, eager reference, fake,
gradient, cost, cases. A `Backend` (in `llama_fast/backends/`) adds rows of `Implementation`s. For
each call signature the op walks the order of the tensor's device type, takes the first
implementation that has no reason to refuse, and keeps its plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import is_tensor_like

from . import torch_library
from .arguments import device_type
from .backends import current_request, when_changed
from .choice import choose, decide, order_of, refuse_strict
from .definition import Definition
from .overrides import exporting_to_onnx, needs_dispatcher, transformed
from .signature import call_signature
from .torch_private import profiler
from .types import Decision, Implementation

# Call signatures whose plans an op keeps at most.
MAX_PLANS = 1024

OPS: dict[str, Op] = {}


@dataclass(eq=False)
class Op(Definition):
    """A definition with several interchangeable implementations; called with its arguments."""

    _orders: dict[tuple, list[tuple[str, Implementation]]] = field(default_factory=dict)
    _plans: dict[tuple, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        OPS[self.name] = self
        torch_library.register(self, self.run)

    def __call__(self, *args: Any) -> Any:
        """Runs the op. Goes through torch's dispatcher only where that is needed: to trace, to
        record a gradient, for tensor subclasses, or to have a name in a profiler's trace; the
        direct call costs a tenth as much."""
        if needs_dispatcher() or profiler._is_profiler_enabled:
            if exporting_to_onnx() or (not torch.compiler.is_compiling() and transformed()):
                return self._defined(*args)
            return self.torch_op(*self.arguments.with_plain_numbers(args))
        signature = call_signature(args, torch.is_grad_enabled())
        if signature is None:
            self.arguments.refuse_negated(args)
            return self.torch_op(*self.arguments.with_plain_numbers(args))
        if self.writes:
            self.arguments.count_writes(args)
        key = (current_request(), signature)
        try:
            launch = self._plans.get(key)
        except TypeError:  # an argument that cannot be hashed is of no type that an op takes
            launch = None
        if launch is None:
            launch = self._specialize(key, args)
        return launch(*args)

    def run(self, *args: Any) -> Any:
        """Checks the arguments, chooses an implementation and launches it; no autograd."""
        args = self.complete(args)
        self.arguments.check_memory(args)
        self.check(*args)
        return self._choose(args).launch(*args)

    def explain(self, *args: Any) -> Decision:
        """Returns which backend would serve the call now, and the reasons of the others."""
        args = self.arguments.with_plain_numbers(self.complete(args))
        self.arguments.check_tensors(args)
        self.check(*args)
        return decide(self, args)

    def forget_order(self) -> None:
        """Forgets what was chosen, as when the implementations have changed."""
        self._orders.clear()
        self._plans.clear()

    def _defined(self, *args: Any) -> Any:
        """What torch.func's transforms and forward-mode gradients are taken of, and what an ONNX
        file gets: the definition, since it is made of what torch can transform and write. torch's
        dispatcher would refuse an op with a gradient of its own, or take its tangents for zero."""
        args = self.complete(args)
        self.arguments.check_tensors(args)
        self.check(*args)
        refuse_strict(
            self, "inside of a torch.func transform, a forward-mode gradient or an ONNX export"
        )
        return self.eager(*args)

    def _specialize(self, key: tuple, args: tuple) -> Callable[..., Any]:
        """The launcher for calls of a signature that `check` lets pass. It is kept: checks and
        limits depend on shapes, strides, dtypes, devices and the request alone (not on addresses or
        values), and a model repeats few signatures. So is that of a fallback, which has warned by
        then. Not kept is a call with a number that is not Python's own, whose value is no part of
        its signature."""
        if any(is_tensor_like(arg) and not isinstance(arg, Tensor) for arg in args):
            return self.torch_op  # such as torch.fx's proxies, which stand for tensors
        plain = self.arguments.with_plain_numbers(args)
        if plain is not args:
            return lambda *args: self(*plain)
        whole = self.complete(args)
        self.arguments.check_tensors(whole)
        self.check(*whole)
        implementation = self._choose(whole)
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        launch = implementation.launch
        if implementation.plan is not None:
            launch = implementation.plan(*args)
        self._plans[key] = launch
        return launch

    def _choose(self, args: tuple) -> Implementation:
        request = current_request()
        key = (device_type(args), request)
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = order_of(self, *key)
        return choose(self, order, request, args)


def _forget_orders() -> None:
    for op in OPS.values():
        op.forget_order()


when_changed.append(_forget_orders)
