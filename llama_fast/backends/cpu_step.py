"""A step of many ops recorded once and replayed without Python between its kernels.

A token of a small model takes some 150 calls of ops. Each streams weights through the caches, so
the interpreter's own code and data have left them when the next call begins, and a call that takes
8 µs in a loop takes 80. A replay is a list of launches that C++ walks through, interrupted only by
what torch computes itself (the embedding, a cast).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..dispatch import OPS, DispatchMode
from ..dispatch.torch_private import is_composite, tree_leaves


class CpuRecorder(DispatchMode):
    """Captures as `captured_step.Capturer` says: the step that warms up is recorded while it runs.

    tape_of  makes an empty `_cpu.Tape`

    A replay works on the memory of the recorded step: on its arguments, with what they then hold,
    and into its results. All of it is kept alive, whatever becomes of the tensors. What Python does
    besides (a branch on a value, a hook) is not repeated, so a step that asks for a value, or whose
    shapes depend on one, is refused.
    """

    def __init__(self, tape_of: Callable[[], Any]) -> None:
        super().__init__()
        self._tape_of = tape_of

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        self._steps: list[Callable[[], Any]] = []
        self._tape: Any = None
        self._kept: list[Any] = []
        self._refusal = ""
        self._inference = torch.is_inference_mode_enabled()
        with self, _Readings(self):
            self._result = step()
        return self._result

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self._refusal:
            raise RuntimeError(self._refusal)
        return self._replay, self._result

    def refuse(self, function: Any) -> None:
        """The step has called what a replay cannot repeat."""
        self._refusal = f"{function} depends on a tensor's values"

    def _replay(self) -> None:
        with torch.inference_mode(self._inference), torch.no_grad():
            for step in self._steps:
                step()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "llama_fast":
            op = OPS[function._opname]
            return self._run_op(op.run, op.complete(args))
        if is_composite(function):
            with self:
                return function.decompose(*args, **kwargs)
        if _depends_on_values(function, args):
            self.refuse(function)
        result = function(*args, **kwargs)
        self._keep(args, kwargs, result)
        if not _is_view(function, (args, kwargs), result):
            self._add(partial(_again, function, args, kwargs, result))
        return result

    def _run_op(self, run: Callable[..., Any], args: tuple) -> Any:
        """What its launcher launches goes on the tape, unless torch computed a part of it."""
        if self._tape is None:
            self._tape = self._tape_of()
        tape, watch = self._tape, _Watch()
        before = len(tape)
        tape.record()
        try:
            with watch:
                result = run(*args)
        finally:
            tape.stop()
        self._keep(args, watch.made, result)
        if watch.computed:
            tape.forget(before)
            self._add(partial(_again, run, args, {}, result))
        elif not before and len(tape):
            self._steps.append(tape.run)
        return result

    def _add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)
        self._tape = None

    def _keep(self, *used: Any) -> None:
        """Tensors, and their memory for itself: `x.data = y` takes it from a tensor."""
        self._kept.append((used, [x.untyped_storage() for x in _tensors(used)]))


OUT_OF_HANDS = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.__array__,
    Tensor.__dlpack__,
}


class _Readings(TorchFunctionMode):
    """Refuses a step that gives a tensor's memory out of torch's hands, where no op is seen."""

    def __init__(self, recorder: CpuRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in OUT_OF_HANDS:
            self._recorder.refuse(function)
        return function(*args, **(kwargs or {}))


class _Watch(DispatchMode):
    """Whether torch computes anything inside the block, and all tensors that are made there."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = False
        self.made: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(function):
            with self:
                return function.decompose(*args, **kwargs)
        result = function(*args, **kwargs)
        self.made.append(result)
        if not _is_view(function, (args, kwargs), result) and function not in _ALLOCATIONS:
            self.computed = True
        return result


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}


def _is_view(function: Any, given: Any, result: Any) -> bool:
    """Whether the result is the memory of an argument, unchanged."""
    if function._schema.is_mutable:
        return False
    memory = {x.untyped_storage()._cdata for x in _tensors(given)}
    return all(x.untyped_storage()._cdata in memory for x in _tensors(result))


def _depends_on_values(function: Any, args: tuple) -> bool:
    """Whether Python gets a value, or a shape that is one."""
    if function is _aten.index.Tensor:  # by numbers, not by a mask
        return not all(index is None or index.dtype is torch.int64 for index in args[1])
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not tags.isdisjoint(function.tags)


def _again(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
    """Computes once more, and puts the results where they were."""
    for old, new in zip(_tensors(result), _tensors(function(*args, **kwargs)), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]
