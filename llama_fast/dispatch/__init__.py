"""Which implementation serves a call of an op, and why."""

from .backends import (
    BACKENDS,
    ORDER,
    backends,
    batch_invariant_on,
    kernels,
    launch_settings,
    observed,
    recorder,
    register_backend,
    reserve,
    use_backend,
    wrapped_launches,
)
from .choice import refuse_strict
from .explain import explain, record_decisions
from .op import OPS, Op
from .overrides import needs_dispatcher
from .step_memory import keep_step_memory, step_memory
from .torch_private import DispatchMode
from .types import Backend, Case, Cost, Decision, Implementation, Sharding, nothing

__all__ = [
    "BACKENDS",
    "OPS",
    "ORDER",
    "Backend",
    "Case",
    "Cost",
    "Decision",
    "DispatchMode",
    "Implementation",
    "Op",
    "Sharding",
    "backends",
    "batch_invariant_on",
    "explain",
    "keep_step_memory",
    "kernels",
    "launch_settings",
    "needs_dispatcher",
    "nothing",
    "observed",
    "record_decisions",
    "recorder",
    "refuse_strict",
    "register_backend",
    "reserve",
    "step_memory",
    "use_backend",
    "wrapped_launches",
]
