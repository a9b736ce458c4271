"""The weights that a training updates: their groups, their float32 copies, their optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..distributed import Processes
from ..distributed.fully_sharded import part_of
from ..errors import ConfigError
from ..utils.shards import is_shard, local
from .config import TrainConfig
from .optim import AdamW

# Names of weights that embedding_learning_rate is for: (the begin, the end).
_EMBEDDINGS = (("embed.", "head."), (".weight", ".values"))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> list[dict[str, object]]:
    """Returns torch's parameter groups: weight decay on matrices alone, and a learning rate of
    their own for embedding, head and trained rows."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in named:
        begins, ends = _EMBEDDINGS
        embedding = name.startswith(begins) and name.endswith(ends)
        groups.setdefault((weight.ndim >= 2, embedding), []).append(weight)
    return [
        {
            "params": weights,
            "weight_decay": config.weight_decay if matrix else 0.0,
            "lr": (config.embedding_learning_rate if embedding else None) or config.learning_rate,
        }
        for (matrix, embedding), weights in groups.items()
    ]


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> AdamW:
    """Returns AdamW over these weights, in the groups of `parameter_groups`."""
    return AdamW(
        parameter_groups(named, config),
        betas=config.betas,
        eps=config.eps,
        moments=config.moments,
        seed=config.seed,
    )


class Weights:
    """The weights of one training, by name, and what updates them.

    Weights of bfloat16 have a float32 copy each ("masters"), which gradients are added up in and
    which is updated and rounded; unless the config says that they are rounded at random.

    Those of a fully sharded model are DTensors, and so are their copies, gradients and moments.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        if not named:
            raise ConfigError(
                "nothing is to be trained: no weight asks for a gradient; put an adapter on the "
                "model, load one with trainable=True, or call model.requires_grad_(True)"
            )
        for name, weight in named.items():
            if weight.dtype == torch.float16:
                raise ConfigError(
                    f"{name} is float16, whose gradients are too small for it; load the model with "
                    "dtype=torch.bfloat16 or torch.float32"
                )
        self.named = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        if config.half_weights == "masters":
            self.masters = {
                name: nn.Parameter(weight.detach().float())
                for name, weight in self.named.items()
                if weight.dtype != torch.float32
            }
        if self.masters and config.step_in_backward:
            raise ConfigError(
                "step_in_backward updates the weights themselves, so those of bfloat16 need "
                'half_weights="stochastic"'
            )
        updated = {**self.named, **self.masters}
        self.updated = list(updated.values())
        self.cut = any(map(is_shard, self.updated))
        self.optimizer = make_optimizer(updated.items(), config)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def take_gradients(self) -> None:
        """Adds what a backward pass has left in half weights to their copies' gradients."""
        for name, master in self.masters.items():
            grad = self.named[name].grad
            if grad is not None:
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                self.named[name].grad = None

    def set_rate(self, scale: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale

    def sum_gradients(self, processes: Processes) -> None:
        """Adds up what the processes of a training have left in their gradients. Those of a fully
        sharded model are sums already."""
        if not self.cut:
            processes.sum_gradients(self.updated)

    def gradient_norm(self, processes: Processes) -> float:
        """Returns the norm of all gradients together, the same on all processes."""
        gradients = [local(w.grad) for w in self.updated if w.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        if self.cut:
            norm = processes.sum([norm**2], self.updated[0].device)[0] ** 0.5
        return norm

    @torch.no_grad()
    def step(self, grad_scale: float = 1.0) -> None:
        """Updates the weights by the gradients times `grad_scale`, and frees these."""
        self.optimizer.step(grad_scale=grad_scale)
        self.optimizer.zero_grad()
        for name, master in self.masters.items():
            self.named[name].copy_(master)

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        for weight in self.named.values():
            weight.grad = None

    def state(self) -> dict[str, object]:
        """Returns what is saved: plain values and tensors, which may be cut."""
        return {
            "weights": {name: weight.detach() for name, weight in self.named.items()},
            "masters": {name: weight.detach() for name, weight in self.masters.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, dict]) -> None:
        """Takes over a state of whole tensors. Raises ValueError or KeyError where it is that of
        other weights."""
        for kind, own in (("weights", self.named), ("masters", self.masters)):
            if state[kind].keys() != own.keys():
                raise ValueError(f"its {kind} have other names")
            for name, weight in own.items():
                if (
                    state[kind][name].shape != weight.shape
                    or state[kind][name].dtype != weight.dtype
                ):
                    raise ValueError(f"its {name} has another shape or dtype")
        for kind, own in (("weights", self.named), ("masters", self.masters)):
            for name, weight in own.items():
                local(weight).copy_(part_of(state[kind][name], weight))
        self.optimizer.load_state_dict(state["optimizer"])
