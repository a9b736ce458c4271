"""The ops of this package in models of Hugging Face's transformers.

`patch(model)` changes one model in place, and its handle takes that back; see docs/patch.md.
Importing this package registers the attention function for `attn_implementation="llama_fast"`.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_fast.patch needs transformers 4.56 or newer: pip install transformers"
    ) from error

from .handle import Patch, patch
from .report import Report, Row
from .verify import Verification

__all__ = ["Patch", "Report", "Row", "Verification", "patch"]
