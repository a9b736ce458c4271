"""The fast implementations of the ops: importing this package registers those that exist here."""

from .. import ops as ops  # every op is declared before its implementations
from . import cpu, cuda, triton

__all__ = ["cpu", "cuda", "triton"]
