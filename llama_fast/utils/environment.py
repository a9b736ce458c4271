"""The environment variables that the package reads, all of them."""

from __future__ import annotations

import os


def triton_interpreter() -> bool:
    """Triton's own TRITON_INTERPRET: kernels then run in its interpreter, on CPU tensors
    too. Triton reads it when it is imported, so it must be set before."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def processes_started() -> int:
    """How many processes torchrun has started, this one among them; 1 without torchrun."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
