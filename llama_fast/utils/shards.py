"""Tensors of which each of several ranks has a part (torch's DTensor): the part, and the whole.

A tensor that is no DTensor is its own part and its own whole, so callers need not ask which it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_shard(x: Any) -> bool:
    """Whether x is a DTensor. Importing these takes a while, and without that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """Returns what this rank has of a tensor, in the same memory."""
    return x.to_local() if is_shard(x) else x


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """Returns a tensor that has all of it. Every rank must call it, for the same tensors in the
    same order."""
    return x.full_tensor() if is_shard(x) else x


def as_shard(part: Tensor, like: Tensor, *columns: int) -> Tensor:
    """Returns the DTensor of which each rank has its part, cut along its rows as `like` is; its
    rows are as long as those of `like`, or of the shape `columns`."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *(columns or like.shape[1:])))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
