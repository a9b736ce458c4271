"""Tensors that any mode can use, whatever mode they are made in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Inside the block, or the function that it decorates, tensors are made that last: weights and
    caches. Those made in inference mode could neither be trained nor written to outside of it.

    Records no gradient; parameters ask for theirs as ever.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
