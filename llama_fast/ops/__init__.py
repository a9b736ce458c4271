"""The op table: each module is one op, and each function here is its public face."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .attention_quantized import attention_quantized
from .cross_entropy import linear_cross_entropy
from .cross_entropy_quantized import linear_cross_entropy_quantized
from .kv_append import kv_append
from .kv_append_quantized import kv_append_quantized
from .linear import linear
from .linear_quantized import linear_quantized
from .linear_swiglu import linear_swiglu
from .linear_swiglu_quantized import linear_swiglu_quantized
from .quantized_kv import QuantizedKV
from .quantized_weight import QuantizedWeight
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "QuantizedKV",
    "QuantizedWeight",
    "add_rms_norm",
    "attention",
    "attention_quantized",
    "kv_append",
    "kv_append_quantized",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_quantized",
    "linear_quantized",
    "linear_swiglu",
    "linear_swiglu_quantized",
    "rms_norm",
    "rope",
    "swiglu",
]
