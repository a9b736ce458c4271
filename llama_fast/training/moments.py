"""The state that AdamW keeps of one parameter: the number of its steps, and two moments.

    step                              from 1 on
    exp_avg, exp_avg_sq               the parameter's shape: float32, or 8 bits with
    exp_avg_scale, exp_avg_sq_scale   a scale for each block of 256 elements

Of a parameter that is cut over several ranks (a DTensor) all of these are cut with it, along its
rows. Blocks must not lie across a border then, wherever it is: so moments have 8 bits where a row
is a number of blocks, as in every matrix of a Llama of a usual size, and scales have a row for each
of its rows. Others, such as those of norms, are float32.

A state is saved and taken over as a whole, so that any number of ranks goes on with it. Numbers are
never rounded on the way: where 8-bit moments cannot be cut, what they stand for is kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.fully_sharded import part_of
from ..errors import ConfigError
from ..ops.quantized_moments import BLOCK, FIRST, SECOND, blocks_of, dequantize
from ..utils.shards import as_shard, is_shard, local

MOMENTS = ("float32", "int8")
_MAPS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}

State = dict[str, Any]


def new_state(param: Tensor, moments: str) -> State:
    """Returns the state before the first step: moments of zeros."""
    full = torch.float64 if param.dtype is torch.float64 else torch.float32
    eight_bits = moments == "int8" and param.numel() >= BLOCK and _can_be_cut(param)
    state: State = {"step": 0}
    for name, kind in _MAPS.items():
        dtype = kind.dtype if eight_bits else full
        state[name] = torch.zeros_like(param, dtype=dtype)
    if eight_bits:
        for name in _MAPS:
            state[_scale(name)] = _zero_scales(param, full)
    return state


def _scale(name: str) -> str:
    return f"{name}_scale"


def _blocks_of_row(param: Tensor) -> int:
    return param.shape[1:].numel() // BLOCK


def _can_be_cut(param: Tensor) -> bool:
    """Whether blocks of the parameter lie within the part of one rank each."""
    if not is_shard(param):
        return True
    along = all(p.is_replicate() or p.is_shard(0) for p in param.placements)
    return along and param.ndim > 1 and param.shape[1:].numel() % BLOCK == 0


def _zero_scales(param: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_shard(param):
        return torch.zeros(blocks_of(param.numel()), dtype=dtype, device=param.device)
    blocks = _blocks_of_row(param)
    own = local(param)
    return as_shard(torch.zeros(len(own), blocks, dtype=dtype, device=own.device), param, blocks)


def of_rank(state: State) -> State:
    """Returns the part of a state that this rank has, as the op `adamw` takes it."""
    own = {name: local(x) if isinstance(x, Tensor) else x for name, x in state.items()}
    for name in map(_scale, _MAPS):
        if name in own:
            own[name] = own[name].view(-1)
    return own


def taken_over(state: State, param: Tensor) -> State:
    """Returns a copy of a saved state for a parameter: what is a whole is cut as the parameter is,
    in memory of its own, on its device.

    Raises ConfigError for a parameter that is cut in another way than along its rows.
    """
    if any(map(is_shard, state.values())):
        return {name: _copied(x, param) for name, x in state.items()}
    eight_bits = _scale("exp_avg") in state
    taken = dict(state)
    if not is_shard(param):
        for name in map(_scale, _MAPS) if eight_bits else ():
            taken[name] = state[name].view(-1)
        return {name: _copied(x, param) for name, x in taken.items()}
    if eight_bits and not _can_be_cut(param):
        for name, kind in _MAPS.items():
            taken[name] = dequantize(state[name], taken.pop(_scale(name)), kind)
    elif eight_bits:
        for name in map(_scale, _MAPS):
            taken[name] = state[name].view(len(param), -1)
    try:
        return {
            name: as_shard(_copied(part_of(x, param), param), param, *x.shape[1:])
            if isinstance(x, Tensor)
            else x
            for name, x in taken.items()
        }
    except ValueError as error:
        raise ConfigError(f"AdamW: a parameter cannot take over a whole state: {error}") from None


def _copied(value: Any, param: Tensor) -> Any:
    return value.to(param.device, copy=True) if isinstance(value, Tensor) else value


def shard_number(param: Tensor) -> int:
    """Returns which part of a parameter this rank has: the same for replicas of one part, another
    one for each other part, and 0 for what is not cut."""
    number = 0
    if is_shard(param):
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                mesh = param.device_mesh
                number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number
