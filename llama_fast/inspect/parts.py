"""Which module of a model makes which step: of this package's Llama, and of transformers' models.

A step has one name in both: "layers.0.attention.q", "layers.0.mlp.hidden", "logits".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import LlamaFastError
from ..model import Llama

# The modules of a layer, by the part that they play in it.
_OWN = {
    "attention_norm": "attention_norm",
    "attention": "attention",
    "qkv": "attention.qkv",
    "attention_output": "attention.output",
    "mlp_norm": "mlp_norm",
    "gate_up": "mlp.gate_up",
    "down": "mlp.down",
}
_TRANSFORMERS = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Norms of single heads, which some families have.
_PER_HEAD = {"q_per_head": "q_norm", "k_per_head": "k_norm"}


class Part(NamedTuple):
    """The part that a module plays, and in which layer; None outside of the layers."""

    role: str
    layer: int | None = None

    def step(self, name: str) -> str:
        """The full name of a step of this part's layer."""
        return name if self.layer is None else f"layers.{self.layer}.{name}"


@dataclass(frozen=True)
class Parts:
    """modules  each with its part
    norm, head  what makes logits of a residual stream
    layers      how many there are
    heads       of q, k and v in one layer
    head_dim    D
    own         whether the model is this package's Llama
    """

    modules: list[tuple[nn.Module, Part]]
    norm: nn.Module
    head: nn.Module
    layers: int
    heads: tuple[int, int, int]
    head_dim: int
    own: bool

    def hooked(self) -> Iterator[tuple[nn.Module, Part]]:
        """Yields those to watch by hooks. A patched layer of transformers makes its second norm in
        a kernel of its own as long as the norm has no hook: that one is found by its weight."""
        patched = set() if self.own else self._patched_layers()
        for module, part in self.modules:
            if part.role != "layer" and not (part.role == "mlp_norm" and part.layer in patched):
                yield module, part

    def norms(self) -> dict[int, Part]:
        """The parts of the norms, by the address of their weight."""
        return {
            module.weight.data_ptr(): part
            for module, part in self.modules
            if part.role.endswith("norm")
        }

    def _patched_layers(self) -> set[int | None]:
        from ..hf.patched import is_patched

        return {part.layer for m, part in self.modules if part.role == "layer" and is_patched(m)}


def parts_of(model: nn.Module) -> Parts:
    """Raises LlamaFastError for a model whose parts are not known."""
    own = isinstance(model, Llama)
    trunk = model if own else getattr(model, "model", None)
    names = ("embed", "norm", "head") if own else ("embed_tokens", "norm", "lm_head")
    table = _OWN if own else _TRANSFORMERS
    try:
        embed, norm = (getattr(trunk, name) for name in names[:2])
        head = getattr(model, names[2])
        modules = [(embed, Part("embedding"))]
        for index, layer in enumerate(trunk.layers):
            modules.append((layer, Part("layer", index)))
            modules += [
                (layer.get_submodule(path), Part(role, index)) for role, path in table.items()
            ]
            for role, path in _PER_HEAD.items():
                if not own and hasattr(layer.self_attn, path):
                    modules.append((getattr(layer.self_attn, path), Part(role, index)))
    except AttributeError as error:
        raise LlamaFastError(
            f"a {type(model).__name__} cannot be traced ({error}); give a llama_fast.Llama, or a "
            "causal language model of transformers with Llama's layers, without adapters"
        ) from None
    modules += [(norm, Part("norm")), (head, Part("head"))]
    if own:
        config = model.config
        heads, D = (config.n_heads, config.n_kv_heads, config.n_kv_heads), config.head_dim
    else:
        config = model.config
        heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        D = trunk.layers[0].self_attn.head_dim
    return Parts(modules, norm, head, len(trunk.layers), heads, D, own)
