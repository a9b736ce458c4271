"""A model over several ranks, each with its share of every layer: tensor parallel.

The modules are the ordinary ones with smaller sizes. q, k, v, gate and up give a rank its own heads
and its own part of the hidden dim, so nothing is exchanged there; the output's and down's products
are sums over what all ranks have, and behind each of them the ranks add up. Of the vocabulary a
rank has a run of rows: it looks up its own tokens, and the rows of all are added up; its logits are
gathered, or each rank keeps its own, of which a draw takes candidates (generation/candidates.py).
So a layer costs two sums of (B,T,C), and a pass one more and the gathering.

All ranks are given the same tokens, and have the same logits bit by bit: they draw the same tokens
from the same seeds, and none tells the others what it has drawn.

The two exchanges are operators of torch's, so that captured steps replay them. They have no
gradient: a model over ranks is for inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LlamaConfig
from ..config.share import Share
from ..dispatch import needs_dispatcher
from ..dispatch.torch_private import below_autograd
from ..errors import ConfigError, GradientError
from ..nn import Embedding, Linear
from .processes import Processes, others_answer, started

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAMESPACE = "llama_fast_ranks"
# Process groups by name: operators take names.
_groups: dict[str, dist.ProcessGroup] = {}

_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Ranks:
    """The ranks that have one model, and which of them this process is."""

    rank: int
    size: int
    group: str
    device: torch.device

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """Those of a mesh of one dim. Raises ConfigError for another one."""
        if mesh.ndim != 1:
            raise ConfigError(
                f"the mesh has {mesh.ndim} dims, and a model is cut along one: give one of them, "
                f'such as mesh["{(mesh.mesh_dim_names or ("tp",))[-1]}"]'
            )
        group = mesh.get_group()
        _groups[group.group_name] = group
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(mesh.get_local_rank(), mesh.size(), group.group_name, device)

    def share(self, config: LlamaConfig) -> Share:
        """What this rank has of a model; raises ConfigError where it cannot be cut so."""
        return Share(config, self.rank, self.size)

    def agree(self, given: dict[str, Any]) -> None:
        """Raises ConfigError, on every rank, where they were not given the same. Ranks of another
        model would exchange what does not fit together, or wait for each other."""
        found: list[Any] = [None] * self.size
        with ranks_answer():
            dist.all_gather_object(found, given, group=group_of(self))
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise ConfigError(
                        f"{name} is {value} on rank 0 and {other[name]} on rank {rank}: give all "
                        "ranks the same folder and the same settings"
                    )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each rank gives."""
        return x if self.size == 1 else torch.ops.llama_fast_ranks.sum(x, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """What each rank gives, one behind another along the last dim."""
        if self.size == 1:
            return x
        return torch.ops.llama_fast_ranks.gather(x, self.size, self.group)


class SummedLinear(Linear):
    """A linear of which each rank has some columns: y is the sum of the ranks'."""

    def __init__(self, own: Linear, ranks: Ranks) -> None:
        super().__init__(*reversed(own.weight.shape), device="meta", dtype=own.weight.dtype)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.sum(super().forward(x))


class GatheredLinear(Linear):
    """A head of which each rank has some rows: y are the logits of all."""

    def __init__(self, own: Linear, share: Share, ranks: Ranks) -> None:
        super().__init__(*reversed(own.weight.shape), device="meta", dtype=own.weight.dtype)
        self.ranks, self.share = ranks, share
        self.leader: Any = None  # what tells the other ranks, where this one leads them

    def own(self, x: Tensor) -> tuple[Tensor, int]:
        """This rank's logits, and how many of the last of them are no token's."""
        config, (start, stop) = self.share.whole, self.share.ranges["V"]
        known = config.vocab_size - config.vocab_padding
        return super().forward(x), max(0, stop - max(start, known))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        # The last rank may have fewer rows, and all give as many.
        y = nn.functional.pad(y, (0, self.share.rows_each - y.shape[-1]))
        return self.ranks.gather(y)[..., : self.share.whole.vocab_size]

    def cross_entropy(self, *args: Any, **kwargs: Any) -> Tensor:
        raise GradientError(
            "a model over ranks is for inference: load it without a mesh to train it, or for a loss"
        )


class SharedEmbedding(Embedding):
    """An embedding of which each rank has some rows."""

    def __init__(self, own: Embedding, share: Share, ranks: Ranks) -> None:
        super().__init__(*own.weight.shape, device="meta", dtype=own.weight.dtype)
        self.ranks = ranks
        self.vocab_size = share.whole.vocab_size
        self.start, self.stop = share.ranges["V"]

    def forward(self, tokens: Tensor) -> Tensor:
        if not needs_dispatcher() and tokens.is_cpu and tokens.numel():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.vocab_size:  # else no rank would know it, and give zeros
                raise IndexError(
                    f"tokens {int(low)} to {int(high)} were given; there are {self.vocab_size}"
                )
        others = (tokens < self.start) | (tokens >= self.stop)
        rows = super().forward((tokens - self.start).masked_fill(others, 0))
        return self.ranks.sum(rows.masked_fill(others.unsqueeze(-1), 0))


def spread(model: nn.Module, share: Share, ranks: Ranks) -> None:
    """Makes a model of the rank's sizes, on the meta device, a part of the whole: puts the modules
    that exchange in the place of those whose result is a part."""
    model.embed = SharedEmbedding(model.embed, share, ranks)
    for block in model.layers:
        block.attention.output = SummedLinear(block.attention.output, ranks)
        block.mlp.down = SummedLinear(block.mlp.down, ranks)
    model.head = GatheredLinear(model.head, share, ranks)


def share_of(model: nn.Module) -> Share | None:
    """What this process has of a model that is spread over ranks; None for one that is not."""
    return getattr(getattr(model, "head", None), "share", None)


def refuse_spread(model: nn.Module, what: str) -> None:
    """Raises ConfigError for a model that is spread over ranks, of which `what` is wanted."""
    if (share := share_of(model)) is not None:
        raise ConfigError(
            f"the model is spread over {share.ranks} ranks, each of which has a part, and {what} "
            "needs it whole: load it without a mesh"
        )


def together(model: nn.Module) -> bool:
    """Whether all ranks of the model run this program alike; not of a model on one process, nor
    where one rank leads the others (generation/follow.py)."""
    return share_of(model) is not None and model.head.leader is None


def group_of(ranks: Ranks) -> dist.ProcessGroup:
    return _groups[ranks.group]


def agreed(model: nn.Module, value: Any) -> Any:
    """What rank 0 gives, on every rank of the model: for what each would choose by itself, such as
    a seed."""
    if not together(model):
        return value
    ranks = model.head.ranks
    given = [value]
    with ranks_answer():
        dist.broadcast_object_list(given, group=group_of(ranks), group_src=0)
    return given[0]


@contextmanager
def launched(device: torch.device) -> Iterator[tuple[torch.device, DeviceMesh | None]]:
    """Inside the block, the processes that torchrun has started are joined, as `started` joins
    them; yields this one's device, and the mesh of all, or None where this is the only one."""
    from torch.distributed.device_mesh import init_device_mesh

    with started(device) as device:
        size = Processes().size
        yield device, init_device_mesh(device.type, (size,)) if size > 1 else None


ranks_answer = partial(others_answer, "rank", "model", "start all of them again")


def _sum(x: Tensor, group: str) -> Tensor:
    total = x.contiguous().clone()
    with ranks_answer():
        dist.all_reduce(total, group=_groups[group])
    return total


def _gather(x: Tensor, size: int, group: str) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    with ranks_answer():
        dist.all_gather(parts, x.contiguous(), group=_groups[group])
    return torch.cat(parts, -1)


def _refuse_gradient(operator: str, x: Tensor, *args: Any) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise GradientError(
            "no gradient goes from rank to rank: a model over ranks is for inference"
        )
    with below_autograd():
        return getattr(torch.ops.llama_fast_ranks, operator)(x, *args)


_library.define("sum(Tensor x, str group) -> Tensor")
_library.define("gather(Tensor x, int size, str group) -> Tensor")
for _name, _function in (("sum", _sum), ("gather", _gather)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    _library.impl(_name, partial(_refuse_gradient, _name), "Autograd")
_library.impl("sum", lambda x, group: torch.empty_like(x), "Meta")
_library.impl(
    "gather", lambda x, size, group: x.new_empty((*x.shape[:-1], size * x.shape[-1])), "Meta"
)
