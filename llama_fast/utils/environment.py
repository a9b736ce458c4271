"""The environment variables that the package reads, all of them."""

from __future__ import annotations

import os


def triton_interpreter() -> bool:
    """Triton's own TRITON_INTERPRET: kernels then run in its interpreter, on CPU tensors
    too. Triton reads it when it is imported, so it must be set before."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")
