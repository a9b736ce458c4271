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
    from .config import LlamaConfig as LlamaConfig
    from .generate import generate as generate
    from .generate import stream as stream
    from .hf import Patch as Patch
    from .hf import patch as patch
    from .kv_cache import KVCache as KVCache
    from .model import Llama as Llama
    from .ops import *  # noqa: F403
    from .registry import Decision as Decision
    from .registry import explain as explain
    from .registry import use_backend as use_backend
    from .tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

# Public names that are no ops, and their modules.
_HOME = {
    "Decision": ".registry",
    "KVCache": ".kv_cache",
    "Llama": ".model",
    "LlamaConfig": ".config",
    "Tokenizer": ".tokenizer",
    "explain": ".registry",
    "generate": ".generate",
    "stream": ".generate",
    "use_backend": ".registry",
}
# Those that need transformers, so no part of `from llama_fast import *`.
_FOR_TRANSFORMERS = {"Patch": ".hf", "patch": ".hf"}


def __getattr__(name: str) -> Any:
    if home := _HOME.get(name) or _FOR_TRANSFORMERS.get(name):
        value = getattr(import_module(home, __name__), name)
    elif name == "__all__":
        value = [*_HOME, *import_module(".ops", __name__).__all__]
    else:
        ops = None if name.startswith("_") else import_module(".ops", __name__)
        if name not in getattr(ops, "__all__", ()):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(ops, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def load_backends() -> None:
    """Registers the backends; the registry asks for them at the first call of an op."""
    import_module(".backends", __name__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # `llama_fast.rope` and `llama_fast.generate` are functions; the import system would put the
        # modules of these names in their place.
        if not (name in ("rope", "generate") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
