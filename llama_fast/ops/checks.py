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


def rows(op: str, name: str, tensor: torch.Tensor, dims: str) -> None:
    """`tensor` has a last dim; any number of others."""
    if tensor.ndim == 0:
        ndim(op, name, tensor, 1, dims)


def heads(op: str, q: torch.Tensor, **others: torch.Tensor) -> None:
    """q is (B,T,H,D) with an even D; the others are (B,T,K,D) with any K."""
    ndim(op, "q", q, 4, "(B, T, H, D)")
    B, T, _, D = q.shape
    if D % 2:
        raise ShapeError(f"{op}: q has head dim D = {D}; it must be even, to be rotated in pairs")
    for name, tensor in others.items():
        ndim(op, name, tensor, 4, "(B, T, K, D)")
        shape(op, name, tensor, (B, T, tensor.shape[2], D), "(B, T, K, D)")


def lengths(op: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    """lengths is (B,) int64 on q's device."""
    shape(op, "lengths", tensor, q.shape[:1], "(B,)")
    if tensor.dtype is not torch.int64 or tensor.device != q.device:
        raise ShapeError(
            f"{op}: lengths is {describe(tensor)}; it must be torch.int64 on {q.device}, as q is: "
            f"convert it with .to({str(q.device)!r}, torch.int64)"
        )
