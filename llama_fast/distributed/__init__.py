"""Several processes that train one model: see docs/training.md, "Many processes"."""

from .processes import Processes, started

__all__ = ["Processes", "started"]
