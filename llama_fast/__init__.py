"""llama_fast: Llama 3 on fused C++, Triton and CUDA kernels behind one table of ops.

The public names are imported at their first use: torch takes seconds to import, and the tokenizer
and the command line's help do without it. `import llama_fast.ops` registers `torch.ops.llama_fast`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import training as train  # noqa: F401
    from .backends.cpu import batch_invariant as batch_invariant
    from .config import LlamaConfig as LlamaConfig
    from .dispatch import Decision as Decision
    from .dispatch import explain as explain
    from .dispatch import use_backend as use_backend
    from .generation.generate import generate as generate
    from .generation.generate import stream as stream
    from .hf import Patch as Patch
    from .hf import patch as patch
    from .inspect import Trace as Trace
    from .inspect import trace as trace
    from .model import Llama as Llama
    from .nn import KVCache as KVCache
    from .ops import *  # noqa: F403
    from .tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

# Public names that are no ops, and their modules.
_HOME = {
    "Decision": ".dispatch",
    "KVCache": ".nn",
    "Llama": ".model",
    "LlamaConfig": ".config",
    "Tokenizer": ".tokenizer",
    "Trace": ".inspect",
    "batch_invariant": ".backends.cpu",
    "explain": ".dispatch",
    "generate": ".generation.generate",
    "stream": ".generation.generate",
    "trace": ".inspect",
    "train": ".training",
    "use_backend": ".dispatch",
}
# Those that need transformers, so no part of `from llama_fast import *`.
_FOR_TRANSFORMERS = {"Patch": ".hf", "patch": ".hf"}


def __getattr__(name: str) -> Any:
    if home := _HOME.get(name) or _FOR_TRANSFORMERS.get(name):
        module = import_module(home, __name__)
        value = module if name == "train" else getattr(module, name)
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
    return sorted({*__getattr__("__all__"), *_FOR_TRANSFORMERS, "__version__"})
