"""The shape of a Llama 3 model: what it is made of, and how each folder format spells it."""

from .model import PRESETS, LlamaConfig
from .rope_scaling import RopeScaling

__all__ = ["PRESETS", "LlamaConfig", "RopeScaling"]
