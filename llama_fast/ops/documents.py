"""Packed documents: several sequences that lie one behind another in a single row of the batch.

They are given in the field's own form (FlashAttention's varlen functions, transformers):

    cu_seqlens (n + 1,) int32      document i is the tokens cu_seqlens[i] … cu_seqlens[i + 1] - 1

so it begins with 0, never falls and ends with T, the tokens of the row. A document may be empty.
Positions start anew in each document, and a token sees its own document only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import ShapeError
from . import checks


def check(op: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Raises ShapeError unless cu_seqlens is (n + 1,) int32 on the device of `like`, of which the
    first dim is the batch and must be 1. The values are not read here."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ShapeError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (n + 1,) for n "
            "documents: 0, and the end of each of them"
        )
    if cu_seqlens.dtype is not torch.int32 or cu_seqlens.device != like.device:
        raise ShapeError(
            f"{op}: cu_seqlens is {checks.describe(cu_seqlens)}; it must be torch.int32 on "
            f"{like.device}: convert it with .to({str(like.device)!r}, torch.int32)"
        )
    if like.shape[0] != 1:
        raise ShapeError(
            f"{op}: packed documents (cu_seqlens) lie in one row, but there are B = "
            f"{like.shape[0]}: put the rows one behind another, and add up their cu_seqlens"
        )


def spans(op: str, cu_seqlens: Tensor, T: int) -> list[tuple[int, int]]:
    """Returns (begin, end) of each document. Reads the values, for which a GPU is waited for.
    Raises ShapeError unless they begin with 0, never fall and end with T."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ShapeError(f"{op}: cu_seqlens[0] is {ends[0]}; the first document begins at 0")
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end < begin:
            raise ShapeError(
                f"{op}: cu_seqlens falls from {begin} to {end} at index {i + 1}; document {i} "
                "cannot end before it begins"
            )
    if ends[-1] != T:
        raise ShapeError(
            f"{op}: cu_seqlens ends with {ends[-1]} and there are T = {T} tokens; it must end "
            "with T: give padding a document of its own, or cut it off"
        )
    return list(itertools.pairwise(ends))


def positions(cu_seqlens: Tensor, T: int) -> Tensor:
    """Returns the position of each of the T tokens in its own document, (T,) int64, without
    reading the values."""
    t = torch.arange(T, device=cu_seqlens.device)
    return t - cu_seqlens[_document_of_each(cu_seqlens, T)]


def same(cu_seqlens: Tensor, T: int) -> Tensor:
    """Returns whether two tokens are of one document, (T, T) bool, without reading the values."""
    document = _document_of_each(cu_seqlens, T)
    return document[:, None] == document


def _document_of_each(cu_seqlens: Tensor, T: int) -> Tensor:
    """(T,) int64: how many documents end at or before each token."""
    t = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
