"""The building blocks of Llama 3 as modules over the ops; import them into a model of your own."""

from .attention import Attention, LayerCache
from .kv_cache import KVCache, cache_dtype
from .linear import Embedding, GateUp, Linear
from .mlp import MLP
from .norm import RMSNorm
from .rope import RotaryEmbedding, rope_tables

__all__ = [
    "MLP",
    "Attention",
    "Embedding",
    "GateUp",
    "KVCache",
    "LayerCache",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "cache_dtype",
    "rope_tables",
]
