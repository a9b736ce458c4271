"""Results files as a page and pictures: `write` makes both, for any number of machines."""

from .page import Written, replace_between_marks, write

__all__ = ["Written", "replace_between_marks", "write"]
