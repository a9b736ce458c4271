"""What the ops check about their arguments; each refusal names the argument and the need."""

from __future__ import annotations

import torch

from ..errors import ShapeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def same_kind(op: str, first: str, a: torch.Tensor, **others: torch.Tensor) -> None:
    """All tensors are floats of one dtype on one device."""
    dtype, device = a.dtype, a.device
    if dtype not in FLOATS:
        raise ShapeError(f"{op}: {first} is {describe(a)}; it must be one of {FLOATS}")
    for name, b in others.items():
        if b.dtype is not dtype:
            raise ShapeError(
                f"{op}: {name} is {b.dtype} and {first} is {dtype}; "
                f"both must have one dtype: convert one with .to({dtype})"
            )
        if b.device != device:
            raise ShapeError(
                f"{op}: {name} is on {b.device} and {first} on {device}; "
                f"move both to one device with .to({str(device)!r})"
            )


def shape(op: str, name: str, tensor: torch.Tensor, needed: tuple, dims: str) -> None:
    """`tensor` has exactly the shape `needed`; `dims` names it in the legend's letters."""
    if tensor.shape != needed:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {dims} = {tuple(needed)}"
        )


def ndim(op: str, name: str, tensor: torch.Tensor, needed: int, dims: str) -> None:
    if tensor.ndim != needed:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {dims}")
