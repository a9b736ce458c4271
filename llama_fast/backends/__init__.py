"""The fast implementations of the ops: importing this package registers those that exist here."""

from . import cpu

__all__ = ["cpu"]
