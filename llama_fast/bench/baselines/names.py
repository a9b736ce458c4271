"""The names of the baselines besides our backends, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Call = Callable[..., Any]

COMPILED = "torch.compile"
# torch's own function; and each of SDPA's ways by itself, where torch alone would take the first
# that serves.
TORCH = ("torch", "torch cudnn", "torch flash", "torch efficient", "torch math")
# Libraries, and the modules that they are imported as.
LIBRARIES = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn", "flashinfer": "flashinfer"}
# Those of SDPA's ways that no CPU has.
ON_GPUS = ("torch cudnn", "torch efficient")
FORWARD_ONLY = ("flashinfer",)
