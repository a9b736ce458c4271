"""How an op is judged: against its eager reference in float64, by the error of same-dtype eager."""

from __future__ import annotations

import torch

from llama_fast.dispatch import Op

GUARD = 64  # elements of NaN on each side of an input


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
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_poisoned(op: Op, args: tuple) -> tuple[torch.Tensor, ...]:
    """Runs the op on fenced inputs with outputs that start as NaN; fails when an input changes.

    Arguments that the schema declares as written may change, but not outside their elements; they
    are returned behind the outputs.
    """
    schema = op._torch_op._schema.arguments
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


def references(op: Op, args: tuple) -> tuple[tuple, tuple]:
    """(eager in the arguments' dtype, eager in float64), written arguments behind the outputs."""
    results = []
    for given in (copies(args), to_float64(copies(args))):
        with torch.no_grad():
            outputs = as_tuple(op.eager(*given))
        written = tuple(
            a
            for argument, a in zip(op._torch_op._schema.arguments, given, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        results.append((*outputs, *written))
    return results[0], results[1]


def assert_accurate(actual, eager, exact, what: str, factor: float = 2.0) -> None:
    """The error of `actual` is at most `factor` times that of `eager`, in the largest and in the
    root mean square; half a unit in the last place of the largest value is always allowed."""
    for i, (a, e, r) in enumerate(zip(actual, eager, exact, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, f"{what}: {a.shape} {a.dtype}"
        if a.dtype is torch.int8:  # a value between two codes may become either
            apart = (a.int() - e.int()).abs()
            assert not a.numel() or apart.max() <= 1, f"{what}: code {i} is off by {apart.max()}"
            assert apart.sum() <= 1 + 0.01 * a.numel(), f"{what}: {apart.sum()} codes differ"
            continue
        if not a.is_floating_point():
            assert torch.equal(a, e), f"{what}: output {i} differs"
            continue
        if a.numel() == 0:
            continue
        finite = torch.isfinite(e)
        assert torch.equal(torch.isfinite(a), finite), f"{what}: output {i} is not finite where due"
        error, allowed = (a.double() - r)[finite].abs(), (e.double() - r)[finite].abs()
        if error.numel() == 0:
            continue
        half_ulp = torch.finfo(a.dtype).eps / 2
        largest, typical = r[finite].abs().max(), r[finite].square().mean().sqrt()
        worst = factor * allowed.max() + half_ulp * largest
        assert error.max() <= worst, f"{what}: output {i}: error {error.max():.3g} > {worst:.3g}"
        mean = factor * allowed.square().mean().sqrt() + half_ulp * typical
        rms = error.square().mean().sqrt()
        assert rms <= mean, f"{what}: output {i}: rms error {rms:.3g} > {mean:.3g}"
