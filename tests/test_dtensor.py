"""The ways in which ranks may share a call of an op: computed in parts, it gives what it gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.dispatch import OPS
from llama_fast.engines.dtensor import ways

from .small_training import one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = 2
SMALL = 300_000  # elements of a case: larger ones say nothing more
FORWARD = [name for name, op in OPS.items() if op.sharding is not None and op.cases]


class Calls(TorchDispatchMode):
    """Keeps the calls of ops, those of their gradients too."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "llama_fast":
            self.made.append((OPS[function.name().partition("::")[2]], args))
        return function(*args, **(kwargs or {}))


def calls(name: str, case) -> list[tuple]:
    """The call of a case, and those that its gradient makes."""
    args = case.make(torch.Generator().manual_seed(0), torch.float32, "cpu")
    if sum(arg.numel() for arg in args if isinstance(arg, Tensor)) > SMALL:
        return []
    op = OPS[name]
    constants = {op.arguments.names[i] for i in op.arguments.constants}
    if op.has_gradient(*op.complete(args)):
        for argument, arg in zip(op.arguments.schema, args, strict=False):
            if isinstance(arg, Tensor) and arg.dtype.is_floating_point:
                arg.requires_grad_(argument.name not in constants)
    with Calls() as kept:
        found = op.torch_op(*args)
        found = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
        if found:
            torch.autograd.grad(
                found, [x for x in args if isinstance(x, Tensor) and x.requires_grad],
                [torch.randn_like(x) for x in found], allow_unused=True,
            )  # fmt: skip
    return kept.made


def on_mesh(arg: object, *mesh: int) -> object:
    """What stands for an argument where no rank is."""
    if not isinstance(arg, Tensor):
        return arg
    return SimpleNamespace(ndim=arg.ndim, shape=arg.shape, mesh=SimpleNamespace(shape=mesh))


def part(arg: object, placement: object, rank: int) -> object:
    cut = isinstance(placement, Shard)
    return arg.chunk(RANKS, placement.dim)[rank].contiguous() if cut else arg


def whole(parts: list[Tensor], placement: object) -> Tensor:
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    return sum(parts) if isinstance(placement, Partial) else parts[0]


@pytest.mark.parametrize("name", FORWARD)
def test_parts_make_the_whole(name):
    seen, cuts = set(), 0
    for case in OPS[name].cases():
        for op, args in calls(name, case):
            results = run(op, args)
            for way in ways(op, *(on_mesh(arg, RANKS) for arg in args)):
                assert len(way.arguments) == len(args) and len(way.results) == len(results)
                placed = zip(args, way.arguments, strict=True)
                cut = [(x.shape[at.dim], at.dim) for x, at in placed if isinstance(at, Shard)]
                if cut and min(cut)[0] < RANKS:  # torch cuts no dim into more parts than it has
                    continue
                ranks = [
                    run(op, [part(*each, rank) for each in zip(args, way.arguments, strict=True)])
                    for rank in range(RANKS)
                ]
                for result, at, *parts in zip(results, way.results, *ranks, strict=True):
                    same = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
                    torch.testing.assert_close(
                        whole(parts, at), result, **same, msg=f"{op.name} {case} {way}"
                    )
                seen.add(op.name)
                cuts += bool(cut)
    assert cuts > len(OPS[name].cases()) // 3
    assert name == "linear_cross_entropy" or len(seen) > (name != "rope")


def run(op, args: list) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = op.run(*args)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(
    ("heads", "mesh", "cut"),
    [
        ((8, 2), (2,), True),
        ((8, 2), (4,), True),  # torch cuts no dim of 2 into 4 parts
        ((6, 3), (2,), False),  # query heads 0 to 2 would go with KV heads 0 and 1
        ((24, 12), (2, 4), False),  # over both dims 6 KV heads in parts of 2, and 12 heads of 3
        ((3, 3), (2,), True),
    ],
)
def test_kv_heads_stay_with_their_query_heads(heads, mesh, cut):
    q, k = (torch.empty(1, 5, count, 8) for count in heads)
    found = ways(OPS["attention"], *(on_mesh(x, *mesh) for x in (q, k, k)), True)
    assert (Shard(2) in [way.results[0] for way in found]) is cut


def test_every_op_says_how_it_is_cut_or_writes():
    assert {name for name, op in OPS.items() if op.sharding is None} == {
        name for name, op in OPS.items() if op.writes
    }
