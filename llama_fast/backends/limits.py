"""Why a kernel of C++ cannot serve a call: what those of the CPU and of CUDA have in common.

Each function takes an op's arguments and returns sentences; an empty list means that it can.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .layout import DTYPES, stride_reasons

# Blocks of a grid along its second and its third axis.
MAX_GRID = 65535


def not_loaded(language: str, module: str, error: ImportError) -> str:
    """Says why the extension module llama_fast.<module> is not here: not built, or not loadable."""
    # The system's loader names the module alone, Python's the package too.
    if error.name in (module, f"llama_fast.{module}"):
        return f"its {language} kernels cannot be loaded: {error}"
    package = Path(__file__).parent.parent
    built = [path.name for path in package.glob(f"{module}.*") if path.suffix in (".so", ".pyd")]
    if built:
        return f"its {language} kernels are built for another Python ({', '.join(built)})"
    return f"its {language} kernels are not built"


def reasons(dtype: torch.dtype, **tensors: torch.Tensor) -> list[str]:
    """A dtype that the kernels have not, or elements apart in the last dim."""
    found = [] if dtype in DTYPES else [f"{dtype} is not one of float32, bfloat16, float16"]
    return found + stride_reasons(**tensors)


def rows_reasons(**tensors: torch.Tensor) -> list[str]:
    """Tensors that do not fit into Rows of csrc/args.h: those have at most three outer dims."""
    found = []
    for name, x in tensors.items():
        if x.dtype not in DTYPES or not x.is_contiguous():
            found += reasons(x.dtype, **{name: x})
            if x.ndim > 4 and not x.is_contiguous():
                found.append(f"{name} has {x.ndim} dims and is not contiguous; at most 4 then")
    return found


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> list[str]:
    return rows_reasons(x=x, weight=weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> list[str]:
    return rows_reasons(x=x, residual=residual, weight=weight)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> list[str]:
    return rows_reasons(gate=gate, up=up)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> list[str]:
    return reasons(q.dtype, q=q, k=k, cos=cos, sin=sin)


def kv_append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, k_scales=None, v_scales=None
) -> list[str]:
    return reasons(q.dtype, q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)


def linear(x: torch.Tensor, *weight: torch.Tensor | int | None) -> list[str]:
    """Of weights of any format: they are contiguous by the op's own checks."""
    return rows_reasons(x=x)
