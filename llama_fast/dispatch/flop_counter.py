"""What torch.utils.flop_counter.FlopCounterMode is told of the ops: the FLOPs of their `cost`.

That module imports Triton, which takes most of a second, so the formulas wait until somebody else
imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODULE = "torch.utils.flop_counter"

_waiting: list[tuple[Any, Callable[..., int]]] = []


def count_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Lets FlopCounterMode count calls of torch.ops.llama_fast.<name>, which is `packet`.

    formula  takes the call's arguments, and its results as `out_val`
    """
    _waiting.append((packet, formula))
    if MODULE in sys.modules:
        _register(sys.modules[MODULE])


def _register(module: ModuleType) -> None:
    while _waiting:
        packet, formula = _waiting.pop()
        module.register_flop_formula(packet, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the module as Python does, and registers what waits for it when it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


if MODULE not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
