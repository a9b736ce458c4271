"""How far rounding may move the results of a definition: a function of its inputs alone.

What eager itself computes in a dtype depends on the machine: each BLAS adds in its own order, each
vector unit has its own exp. Here every step of the definition is computed in float64 instead, from
operands that are moved at random by units of float32, the accumulator, and its result is rounded to
the dtype that the step has in eager. So a sum of n terms is off by units · size of a term · √n,
as it is when it is added in any good order, and the rounding points of the contract are kept.

The numbers drawn are uniform float64: torch makes the same from a seed on every CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Units of float32 by which an operand of a step is moved at most. Some BLAS's products were 5.4
# times as far from float64, in the largest element, as one unit takes them.
UNITS = 4.0

# Steps that move numbers about, choose among them or fill memory: nobody rounds their results.
EXACT = {
    "_local_scalar_dense", "_to_copy", "_unsafe_view", "abs", "amax", "cat", "clamp", "clone",
    "constant_pad_nd", "gather", "index", "masked_fill", "nan_to_num", "neg", "new_empty",
    "new_empty_strided", "new_full", "new_zeros", "ones_like", "slice_backward", "stack", "where",
}  # fmt: skip


class Moved(TorchDispatchMode):
    """Inside the block, torch's operations on float tensors are computed as the module says."""

    def __init__(self, seed: int | None) -> None:
        """Without a seed nothing is moved: each step is rounded as well as it can be."""
        super().__init__()
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, step: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        kinds = {x.dtype for x in leaves if _is_float(x)}
        schema = step._schema
        aliases = any(returned.alias_info is not None for returned in schema.returns)
        if not kinds or aliases or schema.name.removeprefix("aten::") in EXACT:
            return step(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(self._widen, (args, kwargs))
        exact = step(*wide_args, **wide_kwargs)
        if len(kinds) == 1 and not any(isinstance(x, torch.dtype) for x in leaves):
            if all(_is_float(x) for x in tree_leaves(exact)):
                return tree_map(lambda x: x.to(*kinds), exact)
        return tree_map(_round_like, exact, step(*args, **kwargs))

    def _widen(self, x: Any) -> Any:
        """A float tensor in float64, moved; float64 in the place of a float dtype."""
        if isinstance(x, torch.dtype) and x.is_floating_point:
            return torch.float64
        if not _is_float(x):
            return x
        wide = x.double()
        if self.generator is None or x.dtype is torch.float64:
            return wide
        unit = UNITS * torch.finfo(torch.float32).eps
        draw = torch.rand(x.shape, generator=self.generator, dtype=torch.float64)
        return draw.mul_(2 * unit).add_(1 - unit).mul_(wide)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _round_like(x: Any, like: Any) -> Any:
    """What is no float was decided by numbers that nobody moved."""
    return x.to(like.dtype) if _is_float(x) else like
