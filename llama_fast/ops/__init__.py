"""The op table: each module is one op, and each function here is its public face."""

from .attention import attention
from .rms_norm import rms_norm

__all__ = ["attention", "rms_norm"]
