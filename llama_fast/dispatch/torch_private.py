"""Every name of torch that this package uses and torch does not promise, with why it is used.

Where something that torch does promise says the same, it stands in for a name that is gone;
otherwise importing the package fails with the name, instead of giving other results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["DeviceContext", "tree_leaves"]

# What follows is asked in every call of an op, and finding it would take as long as it does.

# torch.is_autocast_enabled asks for one device.
is_autocast_enabled = getattr(
    torch._C,
    "_is_any_autocast_enabled",
    lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda"))),
)
# Whether a TorchDispatchMode, public or of torch's tracers, is to see calls.
count_dispatch_modes = torch._C._len_torch_dispatch_stack
# Whether the call is inside a transform of torch.func: None outside.
functorch_level = torch._C._functorch.maybe_current_level
# Its `_current_level` is -1 outside of torch.autograd.forward_ad.dual_level().
forward_ad = torch.autograd.forward_ad
# Whether torch.jit.trace is recording: torch.jit.is_tracing() costs twice as much.
is_jit_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


class _NoProfiler:
    _is_profiler_enabled = False


# Its `_is_profiler_enabled` is true while torch.profiler runs. Without it, ops have no names in a
# trace.
profiler: Any = (
    torch.autograd.profiler
    if hasattr(torch.autograd.profiler, "_is_profiler_enabled")
    else _NoProfiler
)

# The modes of torch's functions that are on, to tell a default device from one that observes.
count_function_modes = torch._C._len_torch_function_stack
function_mode = torch._C._get_function_stack_at

# An op with a kernel for autograd or autocast of its own calls itself below that.
below_autograd = torch._C._AutoDispatchBelowAutograd
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(
    torch._C.DispatchKey.AutocastCUDA
)


def below_autocast() -> Any:
    """Returns a context in which torch.autocast does not see calls of ops."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def keeps_saved_tensors() -> bool:
    """Whether torch.autograd.graph.saved_tensors_hooks is in force; also where torch cannot say."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
    return top(True) is not None


def is_composite(function: Any) -> bool:
    """Whether an operator only calls others. In inference mode such reach a mode whole."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)


def is_transformed(x: torch.Tensor) -> bool:
    """Whether a transform of torch.func hides the values of x."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def current_stream(index: int) -> int:
    """Returns torch.cuda.current_stream(index).cuda_stream, at a tenth of its cost."""
    return torch._C._cuda_getCurrentRawStream(index)


class DispatchMode(TorchDispatchMode):
    """torch's, but its first call does not import torch's compiler: that takes a second and some
    0.1 GB, and only calls that are being compiled need it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
