"""Weights of a model as 8-bit or 4-bit integers: which of them, in what form, and how rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, ShapeError
from .nn import Embedding, Linear
from .ops import QuantizedWeight
from .ops.linear_quantized import BITS, GROUP_SIZES, packed_shapes
from .ops.quantized_weight import enclosing
from .registry import reserve

# The kinds of weights, and how the names of each end.
KINDS = {
    "attention": ("attention.qkv.weight", "attention.output.weight"),
    "mlp": ("mlp.gate_up.weight", "mlp.down.weight"),
    "embedding": ("embed.weight",),
    "head": ("head.weight",),
}


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored: see `llama_fast.ops.linear_quantized`.

    bits        8 or 4
    group_size  32, 64 or 128 columns share a scale: smaller is closer to the weights, and larger
    symmetric   without offsets: smaller; with them closer to the weights
    """

    bits: int
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", BITS), ("group_size", GROUP_SIZES), ("symmetric", (True, False))
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ConfigError(
                    f"{name} of a quantised weight is {value!r}; it must be one of "
                    f"{', '.join(map(str, allowed))}"
                )

    def buffers(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer of a QuantizedWeight of `shape`, by name."""
        codes, scales = packed_shapes(*shape, self.bits, self.group_size)
        found = {"codes": (codes, torch.uint8), "scales": (scales, torch.float16)}
        if not self.symmetric:
            found["offsets"] = found["scales"]
        return found

    def holding(self, buffers: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """A QuantizedWeight of `shape` that takes these buffers as they are."""
        made = self.empty(shape)
        made.load_state_dict(buffers, assign=True)
        return made

    def empty(self, shape: tuple[int, int]) -> QuantizedWeight:
        """One of `shape` on the meta device: without contents."""
        return QuantizedWeight(*shape, self.bits, self.group_size, self.symmetric, "meta")

    def __str__(self) -> str:
        offsets = "" if self.symmetric else " with offsets"
        return f"{self.bits} bits in groups of {self.group_size}{offsets}"


@dataclass(frozen=True)
class Quantization:
    """The form of each kind of weight; None keeps it as it is.

    attention  projections of q, k and v, and of the output
    mlp        gate, up and down
    embedding  the embedding, and a head that is tied to it
    head       a head of its own
    """

    attention: WeightFormat | None
    mlp: WeightFormat | None
    embedding: WeightFormat | None
    head: WeightFormat | None

    @classmethod
    def of(cls, value: str | Quantization) -> Quantization:
        """The settings of a name, "int8" or "int4", or the given ones. Raises ConfigError."""
        if isinstance(value, Quantization):
            return value
        if isinstance(value, str) and value in NAMED:
            return NAMED[value]
        raise ConfigError(
            f"quantize is {value!r}; it must be one of {', '.join(map(repr, NAMED))}, or a "
            "Quantization that gives the form of each kind of weight"
        )

    def of_weight(self, name: str) -> WeightFormat | None:
        """The form of one of our weights, "layers.0.mlp.down.weight"; None for a norm."""
        return next(
            (getattr(self, kind) for kind, ends in KINDS.items() if name.endswith(ends)), None
        )

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it; `from_dict` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Quantization:
        """Raises ConfigError for anything but what `to_dict` makes."""
        if not isinstance(content, Mapping) or content.keys() != KINDS.keys():
            raise ConfigError(
                f"the kinds of weights are {content!r}; they must be {', '.join(KINDS)}"
            )
        forms = {}
        for kind, form in content.items():
            if form is not None and (
                not isinstance(form, Mapping) or form.keys() != {"bits", "group_size", "symmetric"}
            ):
                raise ConfigError(
                    f"{kind} is {form!r}; it must be null or have bits, group_size and symmetric"
                )
            forms[kind] = None if form is None else WeightFormat(**form)
        return cls(**forms)

    def __str__(self) -> str:
        for name, known in NAMED.items():
            if self == known:
                return name
        kinds: dict[WeightFormat | None, list[str]] = {}
        for kind in KINDS:
            kinds.setdefault(getattr(self, kind), []).append(kind)
        if len(kinds) == 1:
            return str(self.mlp or "as stored")
        return "; ".join(
            f"{', '.join(names)}: {'as stored' if form is None else form}"
            for form, names in kinds.items()
        )


_EIGHT, _FOUR = WeightFormat(8, 64), WeightFormat(4, 32)
# An embedding's error goes through all layers, and a head's straight to the logits: on the demo
# model four bits there double the divergence, for a tenth less memory in the 1B shape.
NAMED = {
    "int8": Quantization(_EIGHT, _EIGHT, _EIGHT, _EIGHT),
    "int4": Quantization(_FOUR, _FOUR, _EIGHT, _EIGHT),
}


def round_weight(weight: Tensor, form: WeightFormat) -> QuantizedWeight:
    """`weight` (C_out, C_in), of any float dtype, rounded to the nearest codes, on its device.

    Scales of four symmetric bits are searched for (see `search_scales`), others take in the largest
    number of a group. Raises ShapeError for a weight that cannot be stored so.
    """
    return QuantizedWeight.from_float(
        weight, form.bits, form.group_size, form.symmetric, fit=best_fit
    )


def round_rows(
    shape: tuple[int, int],
    rows: Iterable[Tensor],
    form: WeightFormat | None,
    device: torch.device | str | None = None,
) -> Tensor | QuantizedWeight:
    """As `round_weight`, for a matrix of `shape` (C_out, C_in) whose rows come some at a time. A
    weight that has no form, of any number of dims, is put together as it is, in its rows' dtype."""
    if form is None:
        return _together(shape, rows)
    of_form = (form.bits, form.group_size, form.symmetric)
    return QuantizedWeight.from_rows(shape, rows, *of_form, fit=best_fit, device=device)


def _together(shape: tuple[int, ...], rows: Iterable[Tensor]) -> Tensor:
    """The tensor of `shape` whose rows come some at a time: it and some rows are all there is."""
    whole, start = None, 0
    for part in rows:
        if part.shape == tuple(shape):
            return part
        if whole is None:
            whole = reserve(torch.empty(shape, dtype=part.dtype, device=part.device))
        whole[start : start + len(part)] = part
        start += len(part)
    if start != shape[0]:
        raise ShapeError(
            f"{start} rows were given for a tensor of {tuple(shape)}; there must be {shape[0]}"
        )
    return whole


def best_fit(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets as of `enclosing`; where they are coarse, the scales of least squares."""
    if bits == 4 and symmetric:
        return search_scales(groups), None
    return enclosing(groups, bits, symmetric)


# Shares of the scale that takes in the largest number. Below 1 it is stretched beyond the codes,
# so that the others fall closer together; more of them than these gain less than 0.2% of error.
_SHARES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
_CHUNK = 1 << 17  # numbers that go through the cache together


def search_scales(groups: Tensor) -> Tensor:
    """The scales, float16 (...), that leave symmetric four-bit codes of `groups` (..., group_size)
    the least squared error, among some.

    For codes q, the scale of least error is s = Σ wq / Σ q² and the error Σ w² - s Σ wq. Codes are
    made for each of _SHARES, and the scale of the best of them is taken.
    """
    rows = groups.reshape(-1, groups.shape[-1])
    found = torch.empty(len(rows), dtype=torch.float16, device=rows.device)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        w = rows[start : start + step]
        low, high = w.aminmax(dim=-1)
        # The largest number by its size is meant for code 0, which stands for -8.
        inverse = (-8 / torch.where(-low > high, low, high)).nan_to_num_(0, 0, 0)
        best, scale = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for share in _SHARES:
            q = (w * (inverse * share).unsqueeze(-1)).round_().clamp_(-8, 7)
            wq, qq = torch.linalg.vecdot(w, q), torch.linalg.vecdot(q, q)
            s = wq / qq.clamp_(min=1)
            better = wq * s > best
            best, scale = torch.where(better, wq * s, best), torch.where(better, s, scale)
        found[start : start + step] = scale
    return found.view(groups.shape[:-1])


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
