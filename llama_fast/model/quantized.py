"""Which weights of a model are quantised, and the quantising of one in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..config.quantization import KINDS, Quantization, WeightFormat
from ..errors import ConfigError
from ..nn import Embedding, Linear
from ..ops import QuantizedWeight
from ..ops.quantized_weight import round_weight


@torch.no_grad()
def quantize_(model: nn.Module, quantization: str | Quantization) -> nn.Module:
    """Replaces weights of a `Llama` by integers, one after another, and returns the model.

    quantization  "int8", "int4" or a Quantization

    Raises ConfigError for settings that are none, and for a model that is quantised already.
    """
    settings = Quantization.of(quantization)
    if (already := quantization_of(model)) is not None:
        raise ConfigError(
            f"the model is quantised already ({already}); quantise the one that it was made from"
        )
    for name, modules in _weights(model):
        form = settings.of_weight(name)
        if form is not None:
            weight = round_weight(modules[0].weight, form)
            for module in modules:
                module.weight = weight
    return model


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantised; None where no weight is. Raises ConfigError where weights of one
    kind have several forms."""
    forms: dict[str, WeightFormat | None] = {}
    for name, modules in _weights(model):
        weight = modules[0].weight
        form = None
        if isinstance(weight, QuantizedWeight):
            form = WeightFormat(weight.bits, weight.group_size, weight.symmetric)
        for kind, ends in KINDS.items():
            if name.endswith(ends) and forms.setdefault(kind, form) != form:
                raise ConfigError(
                    f"{name} is stored in another form ({form or 'as a float'}) than the {kind} "
                    f"weights before it ({forms[kind] or 'as a float'}); one kind has one form"
                )
    if not any(forms.values()):
        return None
    forms.setdefault("head", forms.get("embedding"))  # tied
    return Quantization(**{kind: forms.get(kind) for kind in KINDS})


def _weights(model: nn.Module) -> Iterator[tuple[str, list[Linear | Embedding]]]:
    """The name of each weight of a linear or an embedding, and the modules that hold it."""
    shared: dict[int, tuple[str, list[Linear | Embedding]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding):
            shared.setdefault(id(module.weight), (f"{name}.weight", []))[1].append(module)
    yield from shared.values()
