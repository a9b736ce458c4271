"""Our ops over DTensors, so that modules which torch's tensor parallelism has cut keep them.

    import llama_fast.engines.dtensor  # registers how each op may be cut

From then on an op takes DTensors, forward and backward: of the ways that `Op.sharding` says, torch
chooses the one for which the least has to be moved. Ops that write, `kv_append` and `adamw`, have
none.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .. import ops  # noqa: F401  declares them
from ..dispatch import OPS, Op, Sharding

LEADING = "0123456789"  # letters of the dims that "..." stands for


class Way(NamedTuple):
    """How a call is cut over a dim of a mesh: a placement for each result, and for each argument
    that is a tensor; None for the others."""

    results: list[Placement]
    arguments: list[Placement | None]


def ways(op: Op, *args: Any) -> list[Way]:
    """Returns how a call may be cut, the first being that each rank computes all of it.

    args  the call's, with what has `ndim`, `shape` and `mesh` for each tensor
    """
    rule = op.sharding
    if not isinstance(rule, Sharding):
        rule = rule(*op.complete(args))
    inputs, results = (side.split(", ") for side in rule.dims.split(" -> "))
    schema = op.torch_op._schema.arguments
    tensors = [i for i, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    dims = dict(zip(tensors, inputs, strict=True))
    dims = {i: dims[i] for i in tensors if i < len(args) and args[i] is not None}
    dotted = next((i for i in dims if "..." in dims[i]), None)
    if dotted is None:
        leading = ""
    else:
        leading = LEADING[: args[dotted].ndim - len(dims[dotted].removeprefix("..."))]
    dims = {i: of.replace("...", leading) for i, of in dims.items()}
    results = [of.replace("...", leading) for of in results]
    sizes = {
        letter: size
        for i, of in dims.items()
        for letter, size in zip(of, args[i].shape, strict=False)
    }

    def way(letters: str) -> Way:
        at = partial(_cut_at, letters)
        return Way(
            [at(of) or (Partial() if letters and of != "-" else Replicate()) for of in results],
            [(at(dims[i]) or Replicate()) if i in dims else None for i in range(len(args))],
        )

    cuts = rule.cut.replace("...", " ".join(leading)).split()
    mesh = args[tensors[0]].mesh.shape
    return [way(""), *(way(cut) for cut in cuts if _fit({sizes[one] for one in cut}, mesh))]


def _cut_at(letters: str, dims: str) -> Shard | None:
    return next((Shard(dim) for dim, letter in enumerate(dims) if letter in letters), None)


def _fit(sizes: set[int], mesh: tuple[int, ...]) -> bool:
    """Whether the parts of dims of these sizes belong to each other, over whichever dims of a mesh
    they are cut. Dims of one size are cut alike, evenly or not."""
    least = min(sizes)
    ranks = (math.prod(some) for n in range(len(mesh)) for some in combinations(mesh, n + 1))
    return len(sizes) == 1 or all(least % count == 0 for count in ranks if count <= least)


for _op in OPS.values():
    if _op.sharding is not None:
        register_sharding(_op.torch_op)(partial(ways, _op))
