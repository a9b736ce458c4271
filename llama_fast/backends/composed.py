"""The rows of the ops whose calls several kernels serve: which one takes a call, and what it takes.

A row of kernels takes leading arguments of its op; the others of a call have their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..dispatch import OPS, Implementation


def one_of(pick: Callable[..., tuple[Implementation, int]]) -> Implementation:
    """The row of an op of which `pick` says, for the arguments of a call, the kernels' row and how
    many of the arguments that one takes."""

    def plan(*args: Any) -> Callable[..., Any]:
        row, takes = pick(*args)
        planned = row.launch if row.plan is None else row.plan(*args[:takes])
        return planned if len(args) <= takes else lambda *given: planned(*given[:takes])

    def ask(question: str, otherwise: Any) -> Callable[..., Any]:
        def asked(*args: Any) -> Any:
            row, takes = pick(*args)
            answer = getattr(row, question)
            return otherwise if answer is None else answer(*args[:takes])

        return asked

    return Implementation(ask("launch", None), ask("unsupported", []), ask("how", ""), plan)


def first(count: int, row: Implementation) -> Implementation:
    """A row that is given more arguments than it takes."""
    return Implementation(
        lambda *args: row.launch(*args[:count]), lambda *args: row.unsupported(*args[:count])
    )


def linear(
    dense: Implementation,
    quantized: Implementation,
    dense_swiglu: Implementation,
    quantized_swiglu: Implementation,
) -> Implementation:
    """Those of dense weights take (x, weight), those of quantised ones also (scales, minima, C_out,
    bits, group_size), those with the epilogue all arguments."""

    def pick(x, weight, scales=None, minima=None, C_out=0, bits=0, group_size=0, epilogue=""):
        if epilogue:
            return dense_swiglu if scales is None else quantized_swiglu, 8
        return (dense, 2) if scales is None else (quantized, 7)

    return one_of(pick)


def linear_cross_entropy(dense: Implementation, quantized: Implementation) -> Implementation:
    """That of dense weights takes the arguments up to `row_weights`, the other all."""

    def pick(*args: Any) -> tuple[Implementation, int]:
        return (dense, 8) if len(args) < 9 or args[8] is None else (quantized, 13)

    return one_of(pick)


def linear_backward_x(dense: Implementation, quantized: Implementation) -> Implementation:
    """That of dense weights takes (grad, weight), the other all arguments."""

    def pick(grad, weight, scales=None, minima=None, C_in=0, bits=0, group_size=0):
        return (dense, 2) if scales is None else (quantized, 7)

    return one_of(pick)


def then_swiglu(linear: Implementation, swiglu: Implementation, takes: int) -> Implementation:
    """A row of products of a backend, which takes so many arguments, then its row of `swiglu` on
    the halves of the result, which it always serves."""

    def launch(*args: Any) -> Tensor:
        return swiglu.launch(*linear.launch(*args[:takes]).chunk(2, dim=-1))

    def plan(x: Tensor, *weight: Any) -> Callable[..., Tensor]:
        multiply = linear.plan(x, *weight[: takes - 1])
        gate_up = OPS["linear"].fake(x.to("meta"), *weight[:-1])
        activate = swiglu.plan(*gate_up.chunk(2, dim=-1))
        if takes == 2:
            return lambda x, weight, *_: activate(*multiply(x, weight).chunk(2, -1))
        return lambda *args: activate(*multiply(*args[:takes]).chunk(2, -1))

    return Implementation(
        launch,
        lambda *args: linear.unsupported(*args[:takes]),
        lambda *args: "by linear and swiglu, one after the other",
        plan if linear.plan and swiglu.plan else None,
    )
