"""What torch has put over calls, so that they cannot go straight to a launcher."""

from __future__ import annotations

import sys

import torch

from .torch_private import (
    DeviceContext,
    count_dispatch_modes,
    count_function_modes,
    forward_ad,
    function_mode,
    functorch_level,
    is_autocast_enabled,
    is_jit_tracing,
)


def needs_dispatcher() -> bool:
    """True while something traces or transforms calls: torch.compile, torch.jit.trace, a mode,
    autocast, or what `transformed` asks for."""
    return (
        # torch.compile takes it for true. What else torch.compiler.is_compiling() means, an export,
        # has a mode on.
        torch.compiler.is_dynamo_compiling()
        or is_autocast_enabled()
        or count_dispatch_modes() > 0
        or functorch_level() is not None  # as in `transformed`
        or forward_ad._current_level >= 0
        or is_jit_tracing()
    )


def transformed() -> bool:
    """True inside of torch.func's grad, vmap, jvp and their like, and where tangents may be carried
    along (torch.autograd.forward_ad)."""
    return functorch_level() is not None or forward_ad._current_level >= 0


def exporting_to_onnx() -> bool:
    """True inside of torch.onnx.export, which has no words for an op of another library."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and "torch.onnx" in sys.modules  # asking would import it
        and torch.onnx.is_in_onnx_export()
    )


def function_mode_observes() -> bool:
    """True while a mode of torch's functions is to see calls. A default device is such a mode too,
    but leaves calls with tensors alone."""
    return any(
        type(function_mode(index)) is not DeviceContext for index in range(count_function_modes())
    )
