"""`llama-fast doctor`: what works of this installation on this machine, and why not the rest."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from .options import CHAT_DEMO, DEMO, Debug, example
from .resources import show_resources
from .terminal import show, size, table

if TYPE_CHECKING:
    import torch

    from ..dispatch import Op


@example("llama-fast doctor")
def doctor(
    resources: Annotated[
        bool,
        typer.Option(
            "--resources",
            help="Compile the Triton kernels for every chip, with or without one: some minutes.",
        ),
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="CHIPS", help="sm_90,gfx942 …: of --resources.", show_default="every chip"
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check this installation: versions, what was built, and which backend serves which op.

    Exits with 0 when the package is usable here, and with 1 when it is not.
    """
    if arch and not resources:
        raise typer.BadParameter(
            "it says for which chips --resources compiles. "
            f"Write: llama-fast doctor --resources --arch {arch}",
            param_hint="--arch",
        )
    problems = _versions()
    if not problems:
        problems = [*_machine(), *_backends(), *_ops("cpu"), *_gpu_ops()]
        if resources:
            problems += show_resources(arch)
    for problem in problems:
        show(f"PROBLEM: {problem}")
    if problems:
        raise typer.Exit(1)
    show("llama_fast is usable on this machine.")


def _versions() -> list[str]:
    rows = table("", "")
    rows.add_row("llama_fast", __version__)
    rows.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    problems = []
    try:
        import torch
    except ImportError as error:
        rows.add_row("torch", f"cannot be imported ({error})")
        problems.append("torch cannot be imported; install it: pip install torch")
    else:
        rows.add_row("torch", torch.__version__)
    for package in ("triton", "tiktoken", "safetensors"):
        try:
            rows.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            rows.add_row(package, "not installed")
            if package != "triton":
                problems.append(f"{package} is not installed; pip install {package}")
    show("Versions", rows)
    return problems


def _machine() -> list[str]:
    import torch

    from ..bench.machine import describe

    rows = table("", "")
    rows.add_row("CPU", describe(None)["cpu"])
    rows.add_row("cores", f"{os.cpu_count()} logical ones; torch uses {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        rows.add_row(
            f"GPU cuda:{index}",
            f"{found.name}, {size(found.total_memory)}, compute capability "
            f"{found.major}.{found.minor}",
        )
    if not torch.cuda.is_available():
        rows.add_row("GPU", "none that this torch can use")
    for name, folder in (("demo model", DEMO), ("chat demo", CHAT_DEMO)):
        there = (folder / "tokenizer.model").is_file()
        rows.add_row(name, str(folder) if there else "not part of this installation")
    show("Machine", rows)
    return []


def _backends() -> list[str]:
    import torch

    from ..dispatch import BACKENDS, ORDER, backends

    rows = table("", "")
    problems = []
    for name in BACKENDS:
        backend = backends().get(name)
        if name == "eager":
            rows.add_row(name, "plain PyTorch: serves any call, slowly")
        elif backend is None:
            rows.add_row(name, "not part of this version" + _devices(name))
        elif backend.unavailable:
            rows.add_row(name, f"not available{_devices(name)}: {'; '.join(backend.unavailable)}")
        elif name not in ORDER["cpu"] and not torch.cuda.is_available():
            rows.add_row(name, "installed, and idle: it serves GPUs, and there is none here")
        else:
            rows.add_row(name, "available" + BUILT.get(name, _devices)(name) + _refused(name))
        if name == "cpu" and (backend is None or backend.unavailable):
            problems.append("the C++ kernels cannot be used; install the package again: see above")
    show("Backends", rows)
    return problems


def _devices(name: str) -> str:
    from ..dispatch import ORDER

    return f" (for {', '.join(device for device in ORDER if name in ORDER[device])} tensors)"


def _refused(name: str) -> str:
    """The GPUs here that the backend cannot serve, and why."""
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = {device: _reasons_of_device(name, device) for device in devices}
    return "".join(f"; not on {d}: {'; '.join(why)}" for d, why in found.items() if why)


def _reasons_of_device(name: str, device: torch.device) -> list[str]:
    from ..dispatch import backends

    refuses = backends()[name].refuses
    return refuses(device) if refuses is not None else []


def _architectures(name: str) -> str:
    from ..backends import cuda

    return f"{_devices(name)}: CUDA C++ kernels, built for {', '.join(cuda.architectures())}"


def _isas(name: str) -> str:
    from .. import _cpu

    built, usable = _cpu.built_isas(), _cpu.isas()
    missing = [isa for isa in built if isa not in usable]
    walk = f"GEMV by {_cpu.gemv_walk()}, which suits this CPU"
    text = f": C++ kernels, {_cpu.isa()} in use ({walk}); built for {', '.join(built)}"
    return text + (f" (this CPU lacks {', '.join(missing)})" if missing else "")


# What is said of the kernels of a backend that was compiled.
BUILT = {"cpu": _isas, "cuda": _architectures}


def _gpu_ops() -> list[str]:
    import torch

    return _ops("cuda") if torch.cuda.is_available() else []


def _ops(device: str) -> list[str]:
    """Runs every form of every op once, on the first of its own cases, and says who served it."""
    from ..dispatch import OPS

    problems: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    for _, op in sorted(OPS.items()):
        if op.cases is None:  # the backward of another
            continue
        for label, args in _variants(op, device).items():
            try:
                found[label] = _try(op, args, device)
            except Exception as error:
                found[label] = "none", f"{type(error).__name__}: {error}"
                problems.append(f"{label} fails on {device}: {error}")
    whys = any(why for _, why in found.values())
    rows = table("op", "served by", *["instead of"] * whys)
    for label, (chosen, why) in found.items():
        rows.add_row(label, chosen, *[why] * whys)
    show(f"Ops on {device} tensors (bfloat16); eager could serve each of them too", rows)
    return problems


def _variants(op: Op, device: str) -> dict[str, tuple]:
    """The arguments of the first case of each of the op's forms, by its label."""
    import torch

    found: dict[str, tuple] = {}
    for case in op.cases():
        dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
        args = case.make(torch.Generator("cpu").manual_seed(0), dtype, device)
        found.setdefault(op.label(*args), args)
    return found


def _try(op: Op, args: tuple, device: str) -> tuple[str, str]:
    """Returns who served the op, and why those did not that were asked before."""
    import torch

    from ..dispatch import ORDER, backends

    decision = op.explain(*args)
    with torch.no_grad():
        op(*args)
    asked = ORDER[device][: ORDER[device].index(decision.chosen)]
    # Why a backend cannot be used at all, or not on this GPU, stands under "Backends".
    known = [
        name
        for name in asked
        if name in backends()
        and not backends()[name].unavailable
        and decision.reasons[name] != _reasons_of_device(name, args[0].device)
    ]
    return decision.chosen, " · ".join(f"{n}: {'; '.join(decision.reasons[n])}" for n in known)
