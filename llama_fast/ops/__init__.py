"""The op table: each module is one op, and each function here is its public face."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .cross_entropy import linear_cross_entropy
from .kv_append import kv_append
from .linear import linear
from .quantized_weight import QuantizedWeight
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "QuantizedWeight",
    "add_rms_norm",
    "attention",
    "kv_append",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "swiglu",
]
