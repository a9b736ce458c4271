"""What the ops, their backends and the dispatch between them tell each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Implementation(NamedTuple):
    """One op on one backend.

    `launch` takes the op's arguments and returns its outputs; trailing arguments that have a
    default may be left out. `unsupported` takes all arguments and returns sentences that say why it
    cannot serve them; an empty list means it can. `how`, where there is a choice of ways, says in a
    few words which one it takes. `plan`, where there is one, takes the arguments of a call and
    returns what launches all calls of that signature: with as many arguments, tensors of these
    shapes, strides, dtypes and devices, and these other arguments.
    """

    launch: Callable[..., Any]
    unsupported: Callable[..., list[str]]
    how: Callable[..., str] | None = None
    plan: Callable[..., Callable[..., Any]] | None = None


def nothing(*args: Any) -> list[str]:
    """Returns no reason to refuse a call: for an `Implementation` that serves all of them."""
    return []


@dataclass
class Backend:
    """A family of kernels: why it cannot run here at all (or nothing), and its rows by op name.

    `recorder`, where there is one, makes a `captured_step.Capturer` for steps of its ops.
    `settings`, where there is one, says what its launches depend on besides their arguments.
    `reserve`, where there is one, readies fresh memory that weights or a cache are to fill.
    `batch_invariant`, where there is one, is the context in which a row's bits do not depend on the
    rows beside it.
    `refuses`, where there is one, says why it serves no tensor of a device; its rows say so too.
    """

    name: str
    unavailable: list[str]
    implementations: dict[str, Implementation]
    recorder: Callable[[], Any] | None = None
    settings: Callable[[], tuple] | None = None
    reserve: Callable[[Tensor], Tensor] | None = None
    batch_invariant: Callable[[], AbstractContextManager[None]] | None = None
    refuses: Callable[[torch.device], list[str]] | None = None


class Cost(NamedTuple):
    """What a call must at least move and compute: bytes to and from memory, FLOPs."""

    bytes: int
    flops: int


class Sharding(NamedTuple):
    """How ranks may share a call of an op: which dims of its tensors each may have a part of.

    dims  the dims of each tensor by their letters, as einsum has them: "...C, C -> ...C". Tensors
          stand in the order of the schema, those that may be None too. "-" is whole on each rank,
          "*" a result of no dims
    cut   the letters that may be cut, one word for each way; letters of one word are cut together,
          into parts that belong to each other: "B HK". A result without the letter is then a sum
          over the ranks; all other tensors without it are whole on each
    """

    dims: str
    cut: str


@dataclass(frozen=True)
class Case:
    """Arguments for one test or benchmark of an op: `make(generator, dtype, device)` → args."""

    name: str
    make: Callable[..., tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def __str__(self) -> str:
        return self.name


class Request(NamedTuple):
    """What `use_backend` asked for."""

    backend: str | None = None
    strict: bool = False


class Decision(NamedTuple):
    """Which backend serves a call of an op (its `label`), and for every other one in line the
    reasons why not; how, where the backend has several ways."""

    op: str
    device: str
    chosen: str
    reasons: dict[str, list[str]]
    how: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen}"]
        for backend, reasons in self.reasons.items():
            said = "; ".join(reasons) if reasons else "would serve this call"
            if backend == self.chosen:
                said = " ".join(filter(None, ("serves this call", self.how)))
            lines.append(f"  {backend}: {said}")
        return "\n".join(lines)
