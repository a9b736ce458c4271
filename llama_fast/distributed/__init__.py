"""Several processes: those that train one model (docs/training.md, "Many processes"), each with all
of it or with a part, and those over which one model is spread (docs/distributed.md)."""

from .fully_sharded import fully_shard, is_fully_sharded
from .processes import Processes, started
from .tensor_parallel import Ranks, launched

__all__ = ["Processes", "Ranks", "fully_shard", "is_fully_sharded", "launched", "started"]
