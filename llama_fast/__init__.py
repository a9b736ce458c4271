"""llama_fast: Llama 3 on fused C++, Triton and CUDA kernels behind one table of ops.

The public names are imported at their first use: torch takes seconds to import, and the tokenizer
and the command line's help do without it. `import llama_fast.ops` registers `torch.ops.llama_fast`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import *  # noqa: F403
    from .registry import Decision as Decision
    from .registry import explain as explain
    from .registry import use_backend as use_backend

__version__ = "0.1.0"

_FROM_REGISTRY = ("Decision", "explain", "use_backend")


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ops = import_module(".ops", __name__)
    public = {op: getattr(ops, op) for op in ops.__all__}
    registry = import_module(".registry", __name__)
    public |= {entry: getattr(registry, entry) for entry in _FROM_REGISTRY}
    public["__all__"] = [*public]
    globals().update(public)
    if name not in public:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return public[name]


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]


def load_backends() -> None:
    """Registers the backends; the registry asks for them at the first call of an op."""
    import_module(".backends", __name__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # `llama_fast.rope` is the op: the module with its tables is imported, never shown here.
        if not (name == "rope" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
