"""How a model's weights may be quantised: which of them, and in what form.

The layout of the values is that of `llama_fast.ops.quantized_layout`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, ShapeError

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
ROWS = 16  # interleaved in a block

# The kinds of weights, and how the names of each end.
KINDS = {
    "attention": ("attention.qkv.weight", "attention.output.weight"),
    "mlp": ("mlp.gate_up.weight", "mlp.down.weight"),
    "embedding": ("embed.weight",),
    "head": ("head.weight",),
}


def packed_shapes(
    C_out: int, C_in: int, bits: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the quantised values and of the scales of a (C_out, C_in) weight."""
    if bits not in BITS:
        raise ShapeError(f"bits is {bits}; it must be 8 or 4")
    if group_size not in GROUP_SIZES:
        raise ShapeError(f"group_size is {group_size}; it must be 32, 64 or 128")
    blocks, groups = -(-C_out // ROWS), -(-C_in // group_size)
    columns = 32 // bits  # of the four bytes of a row that lie together
    return (blocks, groups * group_size // columns, ROWS, 4), (blocks, groups, ROWS)


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored: see `llama_fast.ops.quantized_layout`.

    bits        8 or 4
    group_size  32, 64 or 128 columns share a scale: smaller is closer to the weights, and larger
    symmetric   without minima: smaller; 8 bits are closer to the weights with them, 4 without
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
        qdata, scales = packed_shapes(*shape, self.bits, self.group_size)
        found = {"qdata": (qdata, torch.uint8), "scales": (scales, torch.float16)}
        if not self.symmetric:
            found["minima"] = found["scales"]
        return found

    def __str__(self) -> str:
        minima = "" if self.symmetric else " with minima"
        return f"{self.bits} bits in groups of {self.group_size}{minima}"


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
# Four bits in the head too: of the 1B shape, eight there would be a third of what a token reads.
# They double the divergence of the demo model; for whom that matters there is --head-bits 8.
NAMED = {
    "int8": Quantization(_EIGHT, _EIGHT, _EIGHT, _EIGHT),
    "int4": Quantization(_FOUR, _FOUR, _FOUR, _FOUR),
}
