"""The processes of one training, which `torchrun` starts: each computes its part of every step.

Sums over the processes are the only thing they say to each other: of counts before the first
backward pass, and of losses and gradients after the last one. A loss is divided by the count of the
whole step, so nothing is divided by the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LlamaFastError, ProcessError

Item = TypeVar("Item")
BUCKET = 2**25  # elements of gradients that are added up at a time


@contextmanager
def started(device: torch.device) -> Iterator[torch.device]:
    """Inside the block the processes that torchrun has started are joined; yields the device of
    this one: a GPU of its own where `device` is a GPU. Without torchrun, and where they are
    joined already, nothing is done. Join once in a launch: torch's second start finds the addresses
    of the first, and waits for them."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        index = dist.get_node_local_rank()
        if index >= torch.cuda.device_count():
            raise LlamaFastError(
                f"torchrun has started process {index} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs; start no more processes than there are GPUs: "
                f"--nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Processes:
    """This process among those of a training: rank 0 … size-1. `Processes()` are those that are
    joined now, or this one alone, for which all below is nothing to do."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def turns(self, items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
        """Yields this process's share, every size-th item, each with True. Where others have one
        more, the first process's comes with False: it is computed, since all take part in every
        pass of a fully sharded model, but not counted."""
        for start in range(0, len(items), self.size):
            own = start + self.rank < len(items)
            yield items[start + self.rank if own else start], own

    def sum(self, numbers: Iterable[float], device: torch.device) -> list[float]:
        """Returns sums over the processes, in float64: integers are exact."""
        numbers = list(numbers)
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        with others_in_training_answer():
            dist.all_reduce(total)
            return total.tolist()

    @torch.no_grad()
    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Replaces the gradient of each weight by its sum over the processes; none is zeros."""
        if self.size == 1:
            return
        for bucket in _buckets(weights):
            flat = torch.cat([_gradient(weight).flatten() for weight in bucket])
            with others_in_training_answer():
                dist.all_reduce(flat)
            for weight, part in zip(bucket, flat.split([w.numel() for w in bucket]), strict=True):
                weight.grad = part.view(weight.shape)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives the tensors of all processes the values of the first one's."""
        if self.size > 1:
            with others_in_training_answer():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def gather(self, value: Any) -> list[Any]:
        """Returns what each process gives, by ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with others_in_training_answer():
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather(None)


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _buckets(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Weights of one dtype, one after another, until they have BUCKET elements."""
    bucket: list[Tensor] = []
    held = 0
    for weight in weights:
        if bucket and (held + weight.numel() > BUCKET or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(weight)
        held += weight.numel()
    if bucket:
        yield bucket


@contextmanager
def others_answer(each: str, of: str, then: str) -> Iterator[None]:
    """An exchange that fails because another process has ended is said as that.

    each  what the processes are called: "process" of a training, "rank" of a model
    of    what they have between them
    then  what to do
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessError(
            f"{each} {dist.get_rank()}: another {each} of this {of} has ended or does not answer "
            f"({reason}). Its own message, above or below, says why; {then}"
        ) from error


others_in_training_answer = partial(
    others_answer, "process", "training", "the same command goes on from the last saved step"
)
