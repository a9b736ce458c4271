"""How an op is judged: against its eager reference in float64, by what rounding may do to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llama_fast.dispatch import Op

from .rounding import Moved

GUARD = 64  # elements of NaN on each side of an input
DRAWS = 4  # runs with moved operands, of which the largest error counts: one may happen to be exact
FACTOR = 2.0  # times as far from float64 as rounding may take the definition


def to_float64(args: tuple) -> tuple:
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def copies(args: tuple) -> tuple:
    """The same arguments in fresh memory, with the same strides."""
    return tuple(fence(a)[0] if isinstance(a, torch.Tensor) else a for a in args)


def fence(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `x`, strides kept, in a buffer that is NaN (or a huge index) everywhere else."""
    span = (
        1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((span + 2 * GUARD,), poison, dtype=x.dtype, device=x.device)
    copy = buffer[GUARD:].as_strided(x.shape, x.stride(), GUARD)
    copy.copy_(x)
    return copy, buffer


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    if outputs is None:  # of an op that only writes
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_poisoned(op: Op, args: tuple) -> tuple[torch.Tensor, ...]:
    """Runs the op on fenced inputs with outputs that start as NaN; fails when an input changes.

    Arguments that the schema declares as written may change, but not outside their elements; they
    are returned behind the outputs.
    """
    schema, args = op.arguments.schema, op.complete(args)
    fenced = [fence(a) if isinstance(a, torch.Tensor) else (a, None) for a in args]
    before = [None if buffer is None else buffer.clone() for _, buffer in fenced]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    try:
        with torch.no_grad():
            outputs = as_tuple(op(*(a for a, _ in fenced)))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    written = []
    for argument, (given, buffer), old in zip(schema, fenced, before, strict=True):
        if buffer is None:
            continue
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(given.clone())
            given.copy_(old[GUARD:].as_strided(given.shape, given.stride(), GUARD))
        assert same_bits(buffer, old), f"{op.name} wrote to or around its argument {argument.name}"
    return (*outputs, *written)


class Expected(NamedTuple):
    """One result of a definition: in float64, in its dtype, and the largest and the root mean
    square error that rounding may give it."""

    exact: torch.Tensor
    rounded: torch.Tensor
    largest_error: float
    rms_error: float


def expected(function: Callable[..., tuple], args: tuple) -> list[Expected]:
    """What `function(*args)` should return, whatever machine asks: see rounding.py.

    Everything is computed on the CPU; `function` is called several times with copies of `args`.
    """
    args = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    exact = function(*to_float64(copies(args)))
    runs = []
    for seed in (None, *range(DRAWS)):
        with Moved(seed):
            runs.append(function(*copies(args)))
    return [_expected(*of_one) for of_one in zip(exact, *runs, strict=True)]


def _expected(exact: torch.Tensor, rounded: torch.Tensor, *moved: torch.Tensor) -> Expected:
    if not rounded.is_floating_point() or not rounded.numel():
        return Expected(exact, rounded, 0.0, 0.0)
    errors = [_errors(x, exact)[torch.isfinite(rounded) & torch.isfinite(x)] for x in moved]
    largest, rms = zip(*(_largest_and_rms(e) for e in errors), strict=True)
    return Expected(exact, rounded, max(largest), max(rms))


def _errors(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (actual.double() - exact.double()).abs()


def _largest_and_rms(x: torch.Tensor) -> tuple[float, float]:
    return (x.max().item(), x.square().mean().sqrt().item()) if x.numel() else (0.0, 0.0)


def of_op(op: Op, args: tuple) -> list[Expected]:
    """What the op should return, written arguments behind the outputs."""

    def run(*given: Any) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outputs = as_tuple(op.eager(*given))
        schema = op.arguments.schema
        return *outputs, *(
            a
            for argument, a in zip(schema, given, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write and a is not None
        )

    return expected(run, op.complete(args))


def assert_accurate(actual: tuple, wanted: list[Expected], what: str) -> None:
    """The error of `actual` is at most twice what rounding may give, in the largest and in the root
    mean square; half a unit in the last place of the largest value is always allowed."""
    for i, (a, of) in enumerate(zip(actual, wanted, strict=True)):
        a, e = a.cpu(), of.rounded
        assert a.shape == e.shape and a.dtype == e.dtype, f"{what}: {a.shape} {a.dtype}"
        if a.dtype in (torch.int8, torch.uint8):  # a value between two codes may become either
            apart = (a.int() - e.int()).abs()
            assert not a.numel() or apart.max() <= 1, f"{what}: code {i} is off by {apart.max()}"
            assert apart.sum() <= 1 + 0.01 * a.numel(), f"{what}: {apart.sum()} codes differ"
            continue
        if not a.is_floating_point():
            assert torch.equal(a, e), f"{what}: output {i} differs"
            continue
        finite = torch.isfinite(e)
        assert torch.equal(torch.isfinite(a), finite), f"{what}: output {i} is not finite where due"
        largest, rms = _largest_and_rms(_errors(a, of.exact)[finite])
        of_largest, of_rms = _largest_and_rms(of.exact[finite].abs())
        worst, mean = FACTOR * of.largest_error, FACTOR * of.rms_error
        worst += _half_unit(of_largest, a.dtype)
        mean += _half_unit(of_rms, a.dtype)
        assert largest <= worst, f"{what}: output {i}: error {largest:.3g} > {worst:.3g}"
        assert rms <= mean, f"{what}: output {i}: rms error {rms:.3g} > {mean:.3g}"


def _half_unit(size: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of a number of this size."""
    kind = torch.finfo(dtype)
    return max(size * kind.eps, kind.smallest_normal * kind.eps) / 2
