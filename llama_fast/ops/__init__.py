"""The op table: each module is one op, and each function here is its public face."""

from .rms_norm import rms_norm

__all__ = ["rms_norm"]
