"""`llama-fast explain`: which backend serves an op here, and why the others do not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from ..errors import BackendError
from .options import Backend, Debug, Device, DType, Work, device_named, example
from .sizes import LAPTOP, sized
from .terminal import show


@example("llama-fast explain attention --work prefill")
def explain(
    op: Annotated[str, typer.Argument(metavar="OP", help="The op: rms_norm, attention, linear …")],
    shape: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help=f"Model whose sizes the op gets: 1b, 8b …; {LAPTOP} for a laptop."
        ),
    ] = LAPTOP,
    work: Annotated[
        Work, typer.Option(help="What the model does: one token, a prompt, or a training step.")
    ] = Work.decode,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of a prompt or a training step.")
    ] = 512,
    keys: Annotated[int, typer.Option(min=1, metavar="N", help="Seen by a decoded token.")] = 1024,
    dtype: Annotated[DType, typer.Option(help="Of the tensors.")] = DType.bfloat16,
    device: Device = "auto",
    backend: Annotated[
        Backend | None,
        typer.Option(help="Ask this backend first.", show_default="the device's order"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say which backend serves a call of an op on this machine, and why each other one does not.

    The call is the one that a model of that size makes. Nothing is run. In Python,
    `llama_fast.explain("attention", q, k, v)` says it of your own tensors.
    """
    from .. import dispatch as registry
    from ..bench import shapes

    if op not in shapes.NAMES:
        raise BackendError(f"there is no op {op!r}; write one of {', '.join(shapes.NAMES)}")
    config, where = sized(shape), str(device_named(device))
    if work is Work.decode:
        asked = shapes.Work.decode(keys)
    else:
        asked = getattr(shapes.Work, work.value)(tokens)
    training = work is Work.training
    made = shapes.problem_shapes(
        op, config, asked, dtype=dtype.torch, device=where, gradient=training
    )
    said: dict[str, list[str]] = {}
    with registry.use_backend(backend.value) if backend else nullcontext():
        for name, make in made.items():
            decision = registry.explain(op, *make(0))
            said.setdefault(str(decision), []).append(name.removeprefix(op).strip())
    show(f"{asked} of {shape}, {dtype.value}")
    for text, names in said.items():
        which = f"{', '.join(names)}:\n" * (len(said) > 1)
        show(f"\n{which}{text}")
