"""What a call of an op gives by its eager definition in float64, and how far a result is from it.

A call whose reference would not fit into memory is reckoned in parts: attention by heads and blocks
of queries, a cross entropy by blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Op
from ..utils.compare import relative_rms

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
# Bytes of float64 copies up to which the reference is made of them, and of float32 ones beyond.
EXACT_BYTES = 6e9
# Float64 tensors of the size of the scores, or of the logits, that an eager definition holds.
COPIES = 8


def reference(op: Op, args: tuple, which: str) -> tuple[Tensor, ...]:
    """What the pass gives by the eager definition in float64 (in float32 where that is too large).

    which  FORWARD: the outputs; BACKWARD: the gradients of `gradients_of` the outputs; BOTH: both,
           of an op that makes its gradients in the forward pass
    """
    whole = op.label(*args) != "attention packed"  # the definition takes documents one by one
    if op.name == "attention" and whole and _scores(args) * 8 > EXACT_BYTES:
        return _attention_in_parts(op, args, which)
    # Of a quantised weight the definition itself takes a block of rows at a time.
    if op.label(*args) == "linear_cross_entropy" and which != BACKWARD:
        return _cross_entropy_in_parts(op, args)
    if which == BOTH:
        with torch.no_grad():
            return tuple(x for x in op.eager(*_exact(args)) if x.numel())
    return _run(op, _exact(args), which, None)


def distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the farthest output: the root mean square of the difference, relative to that of what is
    expected."""
    return max(relative_rms(one, other) for one, other in zip(found, expected, strict=True))


def outputs(op: Op, found: Any) -> tuple[Tensor, ...]:
    """Those that the op is for, not those that only its gradient needs."""
    if isinstance(found, Tensor):
        return (found,)
    found = tuple(found)
    declared = len(op.torch_op._schema.returns)
    return found[: declared - op.non_differentiable] if len(found) == declared else found


def with_leaves(op: Op, args: tuple) -> tuple[tuple, list[Tensor]]:
    """The arguments, of which those that have a gradient are leaves that ask for it; and these."""
    names = [argument.name for argument in op.arguments.schema]
    args = tuple(
        x.detach().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and name not in op.constants
        else x
        for name, x in zip(names, args, strict=False)
    )
    return args, [x for x in args if isinstance(x, Tensor) and x.requires_grad]


def gradients_of(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Normal numbers, the same for every baseline in every dtype."""
    generator = torch.Generator(found[0].device).manual_seed(0)
    return tuple(
        torch.empty(x.shape, dtype=torch.float32, device=x.device)
        .normal_(generator=generator)
        .to(torch.bfloat16)  # what any dtype holds
        .to(x.dtype)
        for x in found
    )


def _exact(args: tuple) -> tuple:
    size = sum(x.numel() for x in args if isinstance(x, Tensor) and x.is_floating_point())
    dtype = torch.float64 if 8 * size <= EXACT_BYTES else torch.float32
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    )


def _run(
    op: Op, args: tuple, which: str, gradients: tuple[Tensor, ...] | None
) -> tuple[Tensor, ...]:
    """The outputs of these arguments, or the gradients of those of the outputs."""
    if which == FORWARD:
        with torch.no_grad():
            return outputs(op, op.eager(*args))
    args, leaves = with_leaves(op, args)
    found = outputs(op, op.eager(*args))
    return torch.autograd.grad(found, leaves, gradients or gradients_of(found))


def _scores(args: tuple) -> int:
    """How many scores the eager definition of attention holds at once."""
    B, T, H, _ = args[0].shape
    return B * H * T * args[1].shape[1]


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Of rows that have so many float64 numbers each, as many at a time as EXACT_BYTES allow."""
    step = max(1, int(EXACT_BYTES // (8 * COPIES * width)))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _attention_in_parts(op: Op, args: tuple, which: str) -> tuple[Tensor, ...]:
    """A sequence, a KV head and a block of queries at a time: each query sees the keys up to its
    own, and the gradients of keys and values are sums over the blocks."""
    q, k, v, causal, scale, lengths, need_lse, *kv_scales, _ = args
    B, T, H, _ = q.shape
    S, K = k.shape[1:3]
    G = H // K
    made = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    (whole,) = gradients_of((q,))  # the output has q's shape
    for b, h in ((b, h) for b in range(B) for h in range(K)):
        one, heads, its = slice(b, b + 1), slice(h * G, (h + 1) * G), slice(h, h + 1)
        for block in _blocks(T, G * S):
            after = T - block.stop  # queries behind the block's
            seen = slice(0, S if lengths is not None or not causal else S - after)
            scales = (x if x is None else x[one, seen, its] for x in kv_scales)
            part = _exact((q[one, block, heads], k[one, seen, its], v[one, seen, its], *scales))
            behind = after if causal else 0
            rows = None if lengths is None else (lengths[one] - behind).clamp(min=0)
            gradient = whole[one, block, heads].to(part[0].dtype)
            given = (*part[:3], causal, scale, rows, need_lse, *part[3:])
            found = _run(op, given, which, (gradient,))
            made[0][one, block, heads] = found[0].to(torch.float64)
            if which == BACKWARD:
                made[1][one, seen, its] += found[1]
                made[2][one, seen, its] += found[2]
    return tuple(made) if which == BACKWARD else (made[0],)


def _cross_entropy_in_parts(op: Op, args: tuple) -> tuple[Tensor, ...]:
    """A block of rows at a time: the loss, and the gradients that the arguments ask for."""
    x, weight, targets, ignore_index, need_x, need_weight, reduction, *_ = args
    x, weight = _exact((x, weight))
    rows, targets = x.flatten(0, -2), targets.flatten()
    loss, dx, dw = 0.0, [], 0.0
    with torch.no_grad():
        for block in _blocks(rows.shape[0], weight.shape[0]):
            part = (rows[block], weight, targets[block], ignore_index, need_x, need_weight, "sum")
            found = op.eager(*part)
            loss, dw = loss + found[0], dw + found[2]
            dx.append(found[1])
        count = (targets != ignore_index).sum() if reduction == "mean" else 1
        gradients = [torch.cat(dx).view(x.shape)] if need_x else []
        gradients += [dw] if need_weight else []
        return (loss / count, *(gradient / max(count, 1) for gradient in gradients))
