"""`llama-fast bench --tune`: the Triton kernels' launch configurations, measured on this GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import BackendError
from .terminal import growing, note, table
from .units import write_json

if TYPE_CHECKING:
    import torch

    from ..dispatch import Op
    from ..triton_kernels.launch import Launch
    from ..triton_kernels.tune import Tuned

Seconds = Callable[[Callable[[], Any]], float]


def tune_here(wanted: list[tuple[str, str, Any, Any]], dtype: torch.dtype) -> None:
    """Tunes on the current GPU and writes triton_kernels/configs/<stem>.<device>.json.

    wanted  (op, name of the shape, config, work), as `llama-fast bench` makes them
    Raises BackendError where there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "bench --tune measures launch configurations on a GPU, and torch finds none here; run "
            "it on the machine that is to use them"
        )
    from ..bench.timing import device_seconds
    from ..triton_kernels.chips import chip_of_device, slug

    chip = chip_of_device(torch.cuda.current_device())
    found = tune_ops(wanted, dtype, "cuda", device_seconds, lambda launches: spills(chip, launches))
    for path in write(found, slug(torch.cuda.get_device_name()), chip.arch):
        note(f"written: {path}")


def tune_ops(
    wanted: list[tuple[str, str, Any, Any]],
    dtype: torch.dtype,
    device: str,
    seconds: Seconds,
    refuse: Callable[[list[Launch]], str],
) -> list[Tuned]:
    """Returns what was found for each kernel and shape. Where several calls choose by the same
    shape, the one that takes longest decides."""
    from ..triton_kernels.tune import tune

    found: dict[Any, Tuned] = {}
    columns = ("kernel", "shape", "configuration", "time", "before", "timed", "passed over")
    with growing(table(*columns)) as rows:
        for name, call in calls(wanted, dtype, device):
            for one in tune(call, seconds, refuse):
                known = found.get(one.choice)
                if known is None or known.default_seconds < one.default_seconds:
                    found[one.choice] = one
                rows.add_row(
                    one.choice.kernel,
                    " ".join(f"{key}={value}" for key, value in one.choice.shape),
                    " ".join(f"{key}={value}" for key, value in vars(one.config).items()),
                    f"{1e6 * one.seconds:,.1f} µs ({name})",
                    f"{1e6 * one.default_seconds:,.1f}",
                    str(one.timed),
                    str(len(one.refused)),
                )
    return list(found.values())


def calls(
    wanted: list[tuple[str, str, Any, Any]], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], tuple[torch.Tensor, ...]]]]:
    """Yields (name, call) of each op at each shape, strictly on the Triton backend: the op itself,
    and for a prompt, which training has too, its gradient."""
    import torch

    from ..bench.oracle import outputs
    from ..bench.shapes import problem_shapes
    from ..dispatch import OPS, use_backend

    def forward(op: Op, args: tuple) -> Callable[[], tuple[torch.Tensor, ...]]:
        def call() -> tuple[torch.Tensor, ...]:
            with torch.no_grad(), use_backend("triton", strict=True):
                return outputs(op, op(*args))

        return call

    def backward(op: Op, args: tuple) -> Callable[[], tuple[torch.Tensor, ...]]:
        schema = op.arguments.schema
        leaves = [
            a.detach().requires_grad_()
            if isinstance(a, torch.Tensor) and a.is_floating_point() and s.name not in op.constants
            else a
            for a, s in zip(args, schema, strict=True)
        ]
        wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
        with use_backend("triton", strict=True):
            results = outputs(op, op(*leaves))
        grads = [torch.ones_like(result) for result in results]

        def call() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(results, wanted, grads, retain_graph=True)

        return call

    for name, shape, config, work in wanted:
        op = OPS[name]
        for problem, make in problem_shapes(
            name, config, work, dtype=dtype, device=device, gradient=work.tokens > 1
        ).items():
            args = make(0)
            yield f"{problem}, {shape} {work.name}", forward(op, args)
            if work.tokens > 1 and op.has_gradient(*args):
                yield f"{problem} gradient, {shape} {work.name}", backward(op, args)


def spills(chip: Any, launches: list[Launch]) -> str:
    """Returns why one of them must not ship, or nothing."""
    from ..triton_kernels.aot import resources

    for launch in launches:
        row = resources(chip, launch)
        if row.spilled:
            return f"{row.kernel} spills {row.spilled} bytes a thread"
        if row.shared > chip.shared_memory:
            return f"{row.kernel} takes {row.shared} bytes of shared memory"
    return ""


def write(found: list[Tuned], device: str, arch: int | str) -> list[Any]:
    """Writes a file for each stem, whose rows of other kernels and shapes stay; returns them."""
    from ..bench.machine import versions
    from ..triton_kernels.choice import Choice, file_of, measured

    paths = []
    for stem in sorted({one.choice.stem for one in found}):
        path = file_of(stem, device)
        measured.cache_clear()
        measured(stem, device)  # raises for a file that is not one of ours, rather than replace it
        old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        rows = {Choice(stem, row["kernel"], tuple(row["shape"].items())): row for row in old}
        rows |= {one.choice: one.row() for one in found if one.choice.stem == stem}
        content = {
            "device": device,
            "arch": arch,
            "versions": versions("triton"),
            "rows": [rows[choice] for choice in sorted(rows, key=str)],
        }
        write_json(path, content)
        paths.append(path)
    measured.cache_clear()
    return paths
