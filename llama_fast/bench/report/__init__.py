"""Results files as a page and pictures: `write` makes both, for any number of machines."""

from .page import Written, fill, write

__all__ = ["Written", "fill", "write"]
