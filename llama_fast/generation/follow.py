"""A model over ranks for a program that one rank alone can run: it leads, and the others follow.

`generate` runs on every rank alike. A dialog or a server does not: what is typed, and who asks for
what and when, one process knows. So the first rank runs the program, and tells the others each call
of its engine before it makes it. They make the same call, and thereby take part in the exchanges of
every layer. The first rank alone draws: of candidates, which the others give when they are told how
many, and at which temperatures (`candidates.Part`).

    with led(model) as leads:
        if leads:
            ...  # the program; the other ranks leave the block when it has ended

`generate`, sessions and the server's batch work there, one at a time. A call of the model itself is
told to nobody: it would wait for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..distributed.tensor_parallel import group_of, ranks_answer, share_of
from ..errors import ConfigError, KernelError, LlamaFastError, ProcessError
from ..model import Llama
from .candidates import Part
from .engine import Engine

# How long a rank waits for the next call: nobody may ask a server for days. The end of another
# rank is seen at once.
PATIENCE = timedelta(days=365)
# The calls that change an engine; but `restore`, for each rank has a part of what that takes.
CALLS = ("prefill", "step", "step_first", "truncate", "hold", "resume", "free", "reset")
# What all ranks make of the logits after the last of these.
EXCHANGES = ("candidates", "whole")


@contextmanager
def led(model: Llama) -> Iterator[bool]:
    """Yields whether this rank leads: True on the first rank, and for a model that is on one
    process. On the others it yields False when the first one has left the block. Raises
    ProcessError there where it has ended otherwise."""
    if share_of(model) is None:
        yield True
        return
    ranks = model.head.ranks
    members = dist.get_process_group_ranks(group_of(ranks))
    # Python objects; and not on a GPU, where a message would wait for what is being computed.
    leader = Leader(dist.new_group(members, timeout=PATIENCE, backend="gloo"))
    if ranks.rank > 0:
        _follow(model, leader)
        yield False
        return
    model.head.leader = leader
    try:
        yield True
    finally:
        model.head.leader = None
        with suppress(ProcessError):
            leader.say("end")


@contextmanager
def acquire(
    model: Llama, batch: int, max_seq_len: int, kv_cache: str | None = None, **settings: Any
) -> Iterator[Engine]:
    """As `Engine.acquire`; of a model over ranks the engine gives this rank's logits, for a
    `Drawer`. Where this rank leads, the others have the same engine, and make the calls that change
    this one. They have one at a time: raises ConfigError for a second."""
    leader = leader_of(model)
    settings["own_logits"] = share_of(model) is not None
    if leader is None:
        with Engine.acquire(model, batch, max_seq_len, kv_cache, **settings) as engine:
            yield engine
        return
    if leader.busy:
        raise ConfigError(
            "the ranks that follow have one engine at a time, and a session, a server or a text "
            "that has not ended has it: close that first"
        )
    leader.busy = True
    try:
        leader.say("acquire", batch, max_seq_len, kv_cache)
        with LeadingEngine.acquire(model, batch, max_seq_len, kv_cache, **settings) as engine:
            yield engine
    finally:
        leader.busy = False
        with suppress(ProcessError):  # of others that have ended, which has been said
            leader.say("release")


def leader_of(model: Llama) -> Leader | None:
    """What the other ranks are told by, where this one leads them."""
    return getattr(getattr(model, "head", None), "leader", None)


class Leader:
    """The calls that the first rank makes, as the others hear them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.busy = False  # whether an engine is led

    def say(self, name: str, *args: Any) -> None:
        self._exchange([name, _on_the_cpu(args)])

    def hear(self) -> tuple[str, tuple]:
        name, args = self._exchange([None, None])
        return name, args

    def _exchange(self, message: list) -> list:
        with ranks_answer():
            dist.broadcast_object_list(message, group=self._group, group_src=0)
        return message


def _on_the_cpu(args: tuple) -> tuple:
    return tuple(x.cpu() if isinstance(x, Tensor) else x for x in args)


def _told(name: str) -> Callable[..., Any]:
    own = getattr(Engine, name)

    @wraps(own)
    def call(self: LeadingEngine, *args: Any) -> Any:
        if self._telling:  # a call that this one is made of
            return own(self, *args)
        self._telling = True
        try:
            leader_of(self.model).say(name, *args)
            return own(self, *args)
        finally:
            self._telling = False

    return call


class LeadingEngine(Engine):
    """An engine whose calls the other ranks make too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._telling = False

    prefill, step, step_first, truncate, hold, resume, free, reset = map(_told, CALLS)


def _follow(model: Llama, leader: Leader) -> None:
    """Makes the calls that the first rank makes, until it has ended."""
    logits = None  # those after the last call
    with ExitStack() as engines:
        while True:
            name, args = leader.hear()
            if name == "end":
                return
            if name == "release":
                engines.close()
            elif name == "acquire":
                engine = engines.enter_context(Engine.acquire(model, *args, own_logits=True))
            elif name in EXCHANGES:
                known, *args = args
                getattr(Part(model, known), name)(logits, *args)
            else:
                where = engine.cache.lengths.device
                args = tuple(x.to(where) if isinstance(x, Tensor) else x for x in args)
                try:
                    found = getattr(engine, name)(*args)
                    logits = logits if found is None else found
                except (ProcessError, KernelError):
                    raise
                except LlamaFastError:  # the first rank has raised it too, and knows what to do
                    pass
