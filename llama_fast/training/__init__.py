"""Training: data, the loop and what a training learns. Names are imported at their first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .adapter import load_adapter as load_adapter
    from .adapter import lora as lora
    from .blocks import PackedDataset as PackedDataset
    from .config import TrainConfig as TrainConfig
    from .data import Batch as Batch
    from .data import Data as Data
    from .data import read as read
    from .dpo import finetune_dpo as finetune_dpo
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .loop import finetune as finetune
    from .pairs import read_pairs as read_pairs
    from .state import History as History

# Public names and their modules.
_HOME = {
    "Adapter": ".adapter",
    "Batch": ".data",
    "Data": ".data",
    "Evaluation": ".evaluation",
    "History": ".state",
    "PackedDataset": ".blocks",
    "TrainConfig": ".config",
    "finetune_dpo": ".dpo",
    "evaluate": ".evaluation",
    "finetune": ".loop",
    "load_adapter": ".adapter",
    "lora": ".adapter",
    "read": ".data",
    "read_pairs": ".pairs",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
