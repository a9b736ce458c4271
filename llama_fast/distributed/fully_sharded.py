"""A model of which each of several processes holds a part of every weight, to train all of them, or
an adapter beside them: FSDP2 (torch's `fully_shard`; Rajbhandari et al., "ZeRO", 2020).

    forward    the weights of a block are gathered when it comes to it, and let go behind it
    backward   they are gathered again; each process keeps its rows of the gradients' sum

So weights, gradients, moments and float32 copies take 1/n of their memory in each of n processes,
beside a block or two, the embedding and the head, which are whole while they are used. `RowShare`
says which rows are whose. An adapter that is put on the model afterwards freezes the weights, which
stay in parts, and each process has all of it.

Losses are divided by the count of the whole step, so gradients are summed and not averaged. Every
process takes part in every pass: one that has no data for it computes another's, and does not count
it (`Processes.turns`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.share import RowShare
from ..errors import ConfigError
from ..ops import QuantizedWeight
from ..utils.shards import is_shard, local, whole
from .processes import Processes, others_in_training_answer

# What FSDP2 did not have at first.
_NEEDED = (
    "set_gradient_divide_factor",
    "set_force_sum_reduction_for_comms",
    "set_custom_all_gather",
    "set_custom_reduce_scatter",
)


def fully_shard(model: nn.Module) -> nn.Module:
    """Cuts a `Llama` over the processes that are joined (`started`), in place, and returns it. Its
    weights are all trained, or those of an adapter that is put on it then (`lora`); the first
    process's values are everybody's.

    The model moves to this process's device a block at a time, so it may be larger than that.
    `Llama.from_pretrained(DIR, fully_sharded=True)` reads no more than this process's part.
    `save_pretrained`, which all processes then call, gathers the weights again.

    Where this is the only process the model stays whole. Raises ConfigError for a model that is cut
    already, that has an adapter or quantised weights, or weights that are not trained, and for a
    torch that is too old.
    """
    if Processes().size == 1:
        return model
    _refuse_unshardable(model)
    device = torch.device(_kind())
    for _, unit in units(model):
        for weight in unit.parameters():
            if not is_shard(weight):
                weight.data = weight.data.to(device)
                Processes().broadcast([weight])
        shard(unit)
    return model


def _kind() -> str:
    """The kind of device that the processes exchange tensors of."""
    return "cuda" if "nccl" in dist.get_backend() else "cpu"


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields what is gathered at once, with what the names of its weights begin with, in the order
    in which it is cut: the blocks, and last the model, of which embedding, norm and head are left.
    These may be one tensor, so they are one unit."""
    for index, block in enumerate(model.layers):
        yield f"layers.{index}.", block
    yield "", model


def _refuse_unshardable(model: nn.Module) -> None:
    if is_fully_sharded(model):
        raise ConfigError("the model is fully sharded already")
    weights = list(model.parameters())
    if (
        len({weight.dtype for weight in weights}) != 1
        or not all(weight.requires_grad for weight in weights)
        or any(isinstance(module, QuantizedWeight) for module in model.modules())
    ):
        raise ConfigError(
            "only a model whose weights are all trained, and of one dtype, is fully sharded: load "
            "it without quantize and without an adapter. An adapter can be put on it afterwards, "
            "and the weights below that stay in parts"
        )


def shard(unit: nn.Module) -> None:
    """Cuts the weights of a block, or of a model whose blocks are cut already."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    kind = getattr(fsdp, "FSDPModule", None)
    if not all(hasattr(kind, name) for name in _NEEDED):
        raise ConfigError(
            f"FSDP2 of torch {torch.__version__} cannot sum gradients; install a newer torch, such "
            "as 2.13, or start one process"
        )
    mesh = init_device_mesh(_kind(), (Processes().size,))
    # Sums of half gradients over the processes are made in float32, and rounded once.
    policy = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fsdp.fully_shard(unit, mesh=mesh, mp_policy=policy)
    unit.set_gradient_divide_factor(1)
    unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    unit.set_custom_all_gather(_AllGather())
    unit.set_custom_reduce_scatter(_ReduceScatter())
    if hasattr(unit, "loss"):  # it gathers as `forward` does
        unit.loss = partial(_no_view, unit.loss)
        fsdp.register_fsdp_forward_method(unit, "loss")


def _no_view(method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """FSDP2 warns of results that are views: a hook would be lost where they are written to."""
    result = method(*args, **kwargs)
    return result if result._base is None else result.clone()


# torch 2.13 has other names for them, and warns of these.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Memory:
    """Where the exchanges of FSDP2 find theirs."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Memory):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        with others_in_training_answer():
            return _gather(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(_Memory):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        with others_in_training_answer():
            return _scatter(output_tensor, input_tensor, op, group, async_op)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of the model's weights."""
    module = sys.modules.get("torch.distributed.fsdp")  # importing it takes a while
    return isinstance(model, getattr(module, "FSDPModule", ()))


def settle(model: nn.Module) -> None:
    """Lets go what a pass has gathered: one that was judged by, or one that an exception has ended.
    Nothing is done for a model that is whole."""
    if not is_fully_sharded(model):
        return
    for _, unit in units(model):
        unit.reshard()
    with suppress(AttributeError):  # of a torch below 2.13, or where no pass has begun yet
        model.reset_iter_state()


def row_share() -> RowShare:
    """What this process has of a fully sharded model."""
    processes = Processes()
    return RowShare(processes.rank, processes.size)


def parts(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns, by name, the rows that this process has of weights."""
    return {name: local(model.get_parameter(name)) for name in names}


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """Returns, of a tensor that is whole, the rows that this rank has of `like`: a DTensor that is
    cut along its rows over a mesh of one dim, as FSDP2 cuts, or one that is whole itself. Raises
    ValueError for one that is cut otherwise."""
    if not is_shard(like):
        return x
    mesh, placements = like.device_mesh, like.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(f"it is cut as {placements}; Shard(0) over one mesh dim is needed")
    return x[slice(*RowShare(mesh.get_local_rank(), mesh.size()).of(len(like)))]


def gathered(x: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be cut; all processes call it, in one order."""
    with others_in_training_answer():
        return whole(x)


def give(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Gives the first process, which gathers and writes tensors in this order, this one's parts."""
    for name in names:
        gathered(state[name])
