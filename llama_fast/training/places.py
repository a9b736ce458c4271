"""The modules and weights of a model that an adapter stands in the place of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn

from ..checkpoint.adapter_config import Part, parts
from ..errors import ConfigError
from ..model import Llama
from ..nn import Embedding, GateUp, Linear
from ..nn.lora import AdaptedEmbedding, AdaptedGateUp, AdaptedLinear
from ..ops import QuantizedWeight


def adapted(model: Llama, name: str) -> AdaptedLinear | AdaptedEmbedding:
    """Returns a module that takes adapters and holds the weight of the plain one of that name.
    Raises ConfigError for a module of another kind."""
    plain = model.get_submodule(name)
    if isinstance(plain, Embedding):
        return AdaptedEmbedding(plain)
    if not isinstance(plain, Linear):
        raise ConfigError(f"{name} is a {type(plain).__name__}, which takes no adapter")
    kind = AdaptedGateUp if isinstance(plain, GateUp) else AdaptedLinear
    return kind(plain, [part.shape[0] for part in parts_of(model, name)])


def parts_of(model: Llama, name: str) -> list[Part]:
    return [part for part in parts(model.config) if part.ours == name]


def extra_parameters(module: AdaptedLinear | AdaptedEmbedding) -> Iterator[nn.Parameter]:
    """The parameters of a module's adapters."""
    return itertools.chain(module.lora.parameters(), module.rows.parameters())


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def set_weight(module: nn.Module, weight: nn.Parameter | QuantizedWeight) -> None:
    if isinstance(module.weight, QuantizedWeight):
        del module.weight  # torch would refuse a Parameter in a module's place
    module.weight = weight


def dequantize_(model: Llama) -> None:
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight):
            if id(weight) not in done:
                done[id(weight)] = nn.Parameter(weight.dequantize(model.dtype))
            set_weight(module, done[id(weight)])
