"""See inside a model: one forward pass with its tensors, two of them compared, and a page of it."""

from .compare import Comparison, Difference
from .trace import Trace, trace
from .watch import Call, Step

__all__ = ["Call", "Comparison", "Difference", "Step", "Trace", "trace"]
