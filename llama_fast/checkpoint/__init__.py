"""Checkpoints in Meta's and Hugging Face's formats, and quantised ones, read and written a tensor
at a time."""

from __future__ import annotations

from .convert import companions, convert
from .names import NAMES, hf_to_meta_rows, meta_to_hf_rows, state_shapes
from .quantized import QuantizedCheckpoint, quantized_bytes
from .random import initial_std, write_random
from .read import Checkpoint, Progress, open_checkpoint
from .write import write_hf, write_meta
from .write_quantized import stream_quantized, write_quantized

__all__ = [
    "NAMES",
    "Checkpoint",
    "Progress",
    "QuantizedCheckpoint",
    "companions",
    "convert",
    "hf_to_meta_rows",
    "initial_std",
    "meta_to_hf_rows",
    "open_checkpoint",
    "quantized_bytes",
    "state_shapes",
    "stream_quantized",
    "write_hf",
    "write_meta",
    "write_quantized",
    "write_random",
]
