"""Several processes: those that train one model (docs/training.md, "Many processes"), and those
over which one model is spread (docs/distributed.md)."""

from .processes import Processes, started
from .tensor_parallel import Ranks, launched

__all__ = ["Processes", "Ranks", "launched", "started"]
