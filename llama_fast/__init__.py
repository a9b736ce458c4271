"""llama_fast: Llama 3 on fused C++, Triton and CUDA kernels behind one table of ops."""

from . import backends as backends  # registers the backends
from . import rope as _rope  # noqa: F401  now: loaded later, the module would hide the op rope
from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .registry import Decision, explain, use_backend

__version__ = "0.1.0"
__all__ = [*_ops, "Decision", "explain", "use_backend"]
