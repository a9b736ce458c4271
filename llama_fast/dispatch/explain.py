"""Which backends serve calls of ops, said before a call or recorded while calls are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendError
from .backends import BACKENDS, ORDER, backends
from .op import OPS
from .torch_library import NAMESPACE
from .torch_private import DispatchMode
from .types import Decision


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Returns which backend would serve `op(*args)` now, and why each other one does not.

    `print(llama_fast.explain("attention", q, k, v))` shows it; the result's fields are `chosen`,
    `reasons` (every backend → list of sentences, empty where it could serve the call) and `how` (a
    few words, or none). Raises BackendError for an op that does not exist.
    """
    backends()  # importing them declares the ops
    if op not in OPS:
        raise BackendError(f"no op is named {op!r}; there are {', '.join(sorted(OPS))}")
    decision = OPS[op].explain(*OPS[op].arguments.positional(args, kwargs))
    elsewhere = {
        name: [f"it serves tensors on {_devices_of(name)}; these are on {decision.device}"]
        for name in BACKENDS
        if name not in decision.reasons
    }
    return decision._replace(reasons={**decision.reasons, **elsewhere})


def _devices_of(backend: str) -> str:
    return " or ".join(device for device, order in ORDER.items() if backend in order)


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Inside the block, the decision of every call of an op is added to the list that it yields.

    Meant for a step at the end of some work, to say what served it: calls go through torch's
    dispatcher while they are recorded, which costs them some microseconds, and cost nothing more
    otherwise.
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.decisions


class _Recorder(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == NAMESPACE:
            op = OPS[function._opname]
            self.decisions.append(op.explain(*op.complete(args)))
        return function(*args, **(kwargs or {}))
