"""The model of a command: its weights, shown as they stream, and a LoRA on them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import weights_bar

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint, QuantizedCheckpoint
    from ..model import Llama


def check_adapter(adapter: Path | None, source: Checkpoint | QuantizedCheckpoint) -> None:
    """Raises what is wrong with the folder of a LoRA for this model, before the weights are
    read."""
    if adapter is not None:
        from ..checkpoint.adapter import read_adapter

        read_adapter(adapter, source.config)


def load_model(source: Any, *, adapter: Path | None = None, **settings: Any) -> Llama:
    """Returns the model of a folder or a checkpoint, with the LoRA of the folder `adapter`; source
    and settings as `Llama.from_pretrained` takes them."""
    from ..distributed import Processes
    from ..model import Llama

    shown = weights_bar("Loading the weights") if Processes().main else nullcontext()
    with shown as progress:
        llama = Llama.from_pretrained(source, progress=progress, **settings)
    if adapter is not None:
        from ..training import load_adapter

        load_adapter(llama, adapter)
    return llama


def context_of(source: Checkpoint | QuantizedCheckpoint, asked: int | None, most: int) -> int:
    """Returns the context in tokens: as asked for, else the model's own but `most`. Raises
    ConfigError for more than the model's."""
    own = source.config.max_seq_len
    return source.config.shortened(asked or min(own, most)).max_seq_len
