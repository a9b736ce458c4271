"""Ops as torch's dispatcher has them: `torch.ops.llama_fast.<name>` with autograd, autocast, fake
tensors and FLOPs.

`Library.define` and `impl` are used, not `torch.library.custom_op`: a call with a gradient costs
2 µs this way and 57 that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError
from .arguments import Arguments, device_type
from .backends import current_request, requesting
from .choice import refuse_strict
from .definition import Definition
from .flop_counter import count_flops
from .schema import schema_of
from .torch_private import below_autocast, below_autograd, keeps_saved_tensors

NAMESPACE = "llama_fast"
# What torch.autocast casts.
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library(NAMESPACE, "DEF")


def register(op: Definition, run: Callable[..., Any]) -> None:
    """Declares the op to torch.

    run  checks the arguments, chooses an implementation and launches it; no autograd
    """
    _library.define(op.name + schema_of(op.eager, op.writes))
    packet = getattr(torch.ops.llama_fast, op.name)
    op.torch_op = packet.default
    schema = op.torch_op._schema.arguments
    op.arguments = Arguments(op.name, schema, op.constants, op.writes)
    for key in ("CPU", "CUDA"):
        _library.impl(op.name, run, key)
        _library.impl(op.name, partial(_autocast, op), f"Autocast{key}")
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", partial(_fake, op), lib=_library)
    if op.gradient is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{op.name}",
            partial(_backward, op),
            setup_context=partial(_setup_context, op),
            lib=_library,
        )
    else:
        without_gradient = _refuse_gradient if op.writes else _differentiate_definition
        _library.impl(op.name, partial(without_gradient, op), "Autograd")
    if op.cost is not None:
        count_flops(packet, partial(_flops, op))


def _fake(op: Definition, *args: Any) -> Any:
    args = op.complete(args)
    op.check(*args)
    return op.fake(*args)


def _setup_context(op: Definition, ctx: Any, inputs: tuple, output: Any) -> None:
    inputs = op.complete(inputs)
    op.arguments.refuse_gradients_of_constants(inputs)
    if op.non_differentiable:
        ctx.mark_non_differentiable(*output[-op.non_differentiable :])
        # Else autograd makes zeros for each of these: of the loss's dw as many as the head has.
        ctx.set_materialize_grads(False)
    tensors, ctx.scalars = op.save(inputs, output)
    alone = not keeps_saved_tensors()
    ctx.again = op if op.made_again and alone else None
    ctx.makers = [_maker_of(x) if alone else None for x in tensors]
    ctx.save_for_backward(
        *(x if maker is None else None for x, maker in zip(tensors, ctx.makers, strict=True))
    )
    # The backward pass may run in another thread, where the request is not known.
    ctx.request = current_request()


def _backward(op: Definition, ctx: Any, *gradients: Tensor) -> tuple:
    if op.non_differentiable and gradients[0] is None:  # a function behind the op gave none
        return (None,) * len(ctx.needs_input_grad)
    with requesting(ctx.request):
        saved = tuple(
            x if maker is None else maker.again(*maker.saved_tensors)
            for x, maker in zip(ctx.saved_tensors, ctx.makers, strict=True)
        )
        return op.gradient(saved, ctx.scalars, ctx.needs_input_grad, *gradients)


def _maker_of(x: Tensor | None) -> Any:
    """The node of an op that can make `x` again from what it keeps itself, so that `x` need not be
    kept as well; None where `x` is no longer what that op made. Nor does an op make anything again
    where other code keeps what backward passes need (checkpointing, offloading): such may give each
    tensor once only."""
    maker = None if x is None else x.grad_fn
    return maker if getattr(maker, "again", None) and x._version == 0 else None


def _refuse_gradient(op: Definition, *args: Any) -> Any:
    """The op writes arguments, so a gradient through it would be wrong."""
    for name in op.arguments.that_need_a_gradient(args):
        raise GradientError(
            f"{op.name} has no gradient, but {name} requires one: call it under torch.no_grad()"
            + (f", or use {op.grad_alternative}" if op.grad_alternative else "")
        )
    op.arguments.count_writes(args)
    with below_autograd():
        return op.torch_op(*args)


def _differentiate_definition(op: Definition, *args: Any) -> Any:
    """An op without a gradient of its own, since it computes that of another. Where one is to be
    recorded through it, which is a second gradient (create_graph=True), its definition is what
    autograd sees."""
    if not any(op.arguments.that_need_a_gradient(args)):
        with below_autograd():
            return op.torch_op(*args)
    refuse_strict(op, "where its result is to be differentiated again (create_graph=True)")
    args = op.complete(args)
    op.check(*args)
    return op.eager(*args)


def _autocast(op: Definition, *args: Any) -> Any:
    args = op.complete(args)
    with below_autocast():
        return op.torch_op(*_autocast_arguments(op, args))


def _autocast_arguments(op: Definition, args: tuple) -> tuple:
    if not op.autocast:
        return args
    constants, written = op.arguments.constants, op.arguments.written
    floats = {
        i: arg
        for i, arg in enumerate(args)
        if isinstance(arg, Tensor) and arg.dtype in _AUTOCAST_DTYPES and i not in constants
    }
    if op.autocast == "lower":
        dtype = torch.get_autocast_dtype(device_type(args))
    else:
        deciding = [floats[i] for i in written if i in floats] or floats.values()
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in deciding))
    return tuple(
        arg.to(dtype) if i in floats and i not in written else arg for i, arg in enumerate(args)
    )


def _flops(op: Definition, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return op.cost(*op.arguments.positional(args, kwargs)).flops
