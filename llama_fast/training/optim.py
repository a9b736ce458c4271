"""AdamW over the op `adamw`: 8-bit moments, bfloat16 weights rounded stochastically, and steps that
are taken while the backward pass runs.

Bytes a parameter, gradient included: 16 with float32 weights and moments, 12 with bfloat16 weights,
6 with 8-bit moments as well, and 4 where each step is taken in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import adamw
from ..ops.random_bits import seed_of
from ..utils.shards import is_shard, local
from .moments import MOMENTS, new_state, of_rank, shard_number, taken_over


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay), each parameter in one pass.

    params   parameters, or groups of them: dicts with `params` and any of the options that follow
    lr, betas, eps, weight_decay  as in `torch.optim.AdamW`
    moments  "float32"; or "int8": two bytes for both, with a scale for each block of 256 elements
             (parameters with fewer elements keep float32)
    stochastic_rounding  of bfloat16 weights and 8-bit moments. Rounded to the nearest, most
             updates of a bfloat16 weight vanish
    seed     of that rounding: what a step does depends on it, on the parameter's place among all of
             them, and on the number of its step, nothing else

    Parameters are float32 or bfloat16 and contiguous. The state dict holds moments in their own
    dtypes and the number of each parameter's steps, so a resumed training has the same bits. Raises
    ConfigError for options that cannot be.

    A parameter that is cut over several ranks (a DTensor, as torch's `fully_shard` makes it) is
    updated part by part, each on its rank, without any exchange, and its moments are cut as it is.
    Which of them have 8 bits: `moments.py`. `load_state_dict` takes moments that are whole too.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        moments: str = "float32",
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        options |= {"moments": moments, "stochastic_rounding": stochastic_rounding, "seed": seed}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor] | None = None, *, grad_scale: float = 1.0
    ) -> Tensor | None:
        """Takes a step of every parameter that has a gradient; returns what `closure` returned.

        closure     computes the loss and its gradients
        grad_scale  what gradients are multiplied by where they are read, such as the factor of a
                    clip over the number of tokens
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, group, param in self._parameters():
            if param.grad is not None:
                self._step(place, group, param, grad_scale)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state: as torch's own, which would cast moments to the parameters' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for (_, _, param), index in zip(self._parameters(), saved, strict=True):
            if index in state_dict["state"]:
                self.state[param] = taken_over(state_dict["state"][index], param)

    def _parameters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Each parameter with its place among all of them, and its group."""
        place = 0
        for group in self.param_groups:
            for param in group["params"]:
                yield place, group, param
                place += 1

    def _step(self, place: int, group: dict[str, Any], param: Tensor, grad_scale: float) -> None:
        if param.grad.is_sparse:
            raise ConfigError(
                "AdamW: a gradient is sparse; it must be dense: make embeddings with sparse=False"
            )
        state = self.state[param]
        if not state:
            state.update(new_state(param, group["moments"]))
        state["step"] += 1
        seed = None
        if group["stochastic_rounding"]:
            if number := shard_number(param):  # other parts of a parameter draw other bits
                place += number * sum(len(group["params"]) for group in self.param_groups)
            seed = seed_of(group["seed"], place, state["step"])
        own = of_rank(state)
        adamw(
            local(param),
            _gradient(param).contiguous(),
            own["exp_avg"],
            own["exp_avg_sq"],
            step=state["step"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            seed=seed,
            exp_avg_scale=own.get("exp_avg_scale"),
            exp_avg_sq_scale=own.get("exp_avg_sq_scale"),
        )


def _gradient(param: Tensor) -> Tensor:
    """What this rank has of the gradient, which is cut as the parameter is."""
    grad = param.grad
    if is_shard(grad) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def _check(options: dict[str, Any]) -> None:
    if options["moments"] not in MOMENTS:
        raise ConfigError(f"AdamW: moments is {options['moments']!r}; it must be one of {MOMENTS}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(options[name]) < math.inf:
            raise ConfigError(f"AdamW: {name} is {options[name]}; it must be a number from 0 on")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ConfigError(f"AdamW: betas is {options['betas']}; both must be in [0, 1)")


class StepInBackward:
    """Steps taken in the backward pass, until `remove` is called or a `with` block ends."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Ends it: gradients are kept again, and `optimizer.step()` steps as usual."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def step_in_backward(
    model: nn.Module,
    optimizer: AdamW,
    *,
    accumulation: int = 1,
    grad_clip: float | None = None,
) -> StepInBackward:
    """Takes each parameter's step as soon as the backward pass has its gradient, which is freed at
    once: no more than a few gradients exist at a time. Returns a handle that takes it back.

    model         its parameters that require a gradient are those of the optimizer
    accumulation  micro-batches of a step: 1, since each backward pass is a step
    grad_clip     None: the norm of all gradients is known only after the last of them
    Set the learning rate before the backward pass; `optimizer.step()` finds no gradients and does
    nothing. Raises ConfigError for another accumulation, for a clip, and for a parameter that
    requires a gradient and is not the optimizer's.
    """
    if accumulation != 1:
        raise ConfigError(
            f"step_in_backward: accumulation is {accumulation}; it must be 1, since every backward "
            "pass takes a step: make the batches larger, or step after the backward passes"
        )
    if grad_clip is not None:
        raise ConfigError(
            f"step_in_backward: grad_clip is {grad_clip}; it must be None, since the norm of all "
            "gradients is known after the last of them alone: step after the backward pass to clip"
        )
    found = {param: (place, group) for place, group, param in optimizer._parameters()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if missing := [name for name, param in trained.items() if param not in found]:
        raise ConfigError(
            f"step_in_backward: {', '.join(missing[:3])} require a gradient and are not among the "
            "optimizer's parameters: add them, or call requires_grad_(False) on them"
        )

    @torch.no_grad()
    def step(param: Tensor) -> None:
        place, group = found[param]
        optimizer._step(place, group, param, 1.0)
        param.grad = None

    return StepInBackward([p.register_post_accumulate_grad_hook(step) for p in trained.values()])
