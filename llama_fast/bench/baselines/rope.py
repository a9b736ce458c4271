"""Who has `rope` in one function."""

from __future__ import annotations

import torch
from torch import Tensor

OP = "rope"


def of_liger(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    tables = (torch.cat((table, table), -1)[None] for table in (cos, sin))
    # It writes what it is given, and an op never does.
    q, k = (x.transpose(1, 2).clone() for x in (q, k))
    return tuple(x.transpose(1, 2) for x in LigerRopeFunction.apply(q, k, *tables))


BASELINES = {"liger-kernel": of_liger}
