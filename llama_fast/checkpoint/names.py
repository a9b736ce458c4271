"""The names and shapes of a Llama's weights: Meta's, Hugging Face's and ours, in one table.

Legend of dims: H query heads, K KV heads, D head dim, C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from ..config import LlamaConfig


@dataclass(frozen=True)
class Name:
    """A row of the table: one published matrix. {i} stands for the layer.

    Rows with the same name of ours are stacked in it, in the order of the table. `cut` is the
    dim along which Meta's several files share the matrix; None: each file holds all of it.
    `rotary` are the heads of a matrix whose rows RoPE turns in pairs, and which the two formats
    order differently (see `meta_to_hf_rows`).
    """

    ours: str
    meta: str
    hf: str
    shape: tuple[str, ...]
    cut: int | None
    rotary: str | None = None


_OURS, _META, _HF = "layers.{i}.", "layers.{i}.", "model.layers.{i}."
_QKV, _GATE_UP = _OURS + "attention.qkv.weight", _OURS + "mlp.gate_up.weight"
_ATTN, _FFN = _META + "attention.", _META + "feed_forward."
_HF_ATTN, _HF_MLP = _HF + "self_attn.", _HF + "mlp."

EMBED, HEAD = "embed.weight", "head.weight"

# fmt: off
NAMES: tuple[Name, ...] = (
    Name(EMBED, "tok_embeddings.weight", "model.embed_tokens.weight", ("V", "C"), 0),
    Name(_OURS + "attention_norm.weight", _META + "attention_norm.weight", _HF + "input_layernorm.weight", ("C",), None),  # noqa: E501
    Name(_QKV, _ATTN + "wq.weight", _HF_ATTN + "q_proj.weight", ("H·D", "C"), 0, rotary="H"),
    Name(_QKV, _ATTN + "wk.weight", _HF_ATTN + "k_proj.weight", ("K·D", "C"), 0, rotary="K"),
    Name(_QKV, _ATTN + "wv.weight", _HF_ATTN + "v_proj.weight", ("K·D", "C"), 0),
    Name(_OURS + "attention.output.weight", _ATTN + "wo.weight", _HF_ATTN + "o_proj.weight", ("C", "H·D"), 1),  # noqa: E501
    Name(_OURS + "mlp_norm.weight", _META + "ffn_norm.weight", _HF + "post_attention_layernorm.weight", ("C",), None),  # noqa: E501
    Name(_GATE_UP, _FFN + "w1.weight", _HF_MLP + "gate_proj.weight", ("F", "C"), 0),
    Name(_GATE_UP, _FFN + "w3.weight", _HF_MLP + "up_proj.weight", ("F", "C"), 0),
    Name(_OURS + "mlp.down.weight", _FFN + "w2.weight", _HF_MLP + "down_proj.weight", ("C", "F"), 1),  # noqa: E501
    Name("norm.weight", "norm.weight", "model.norm.weight", ("C",), None),
    Name(HEAD, "output.weight", "lm_head.weight", ("V", "C"), 0),
)
# fmt: on

# Tables of RoPE that some writers saved with the weights; they follow from the config.
IGNORED = re.compile(r"rope\.freqs|.*rotary_emb\.inv_freq")

# Where each letter of a shape stands in the two config files.
_KEYS = {
    "meta": {"V": "vocab_size", "C": "dim", "H": "n_heads", "K": "n_kv_heads", "D": "dim / n_heads",
             "F": "ffn_dim_multiplier and multiple_of"},
    "hf": {"V": "vocab_size", "C": "hidden_size", "H": "num_attention_heads",
           "K": "num_key_value_heads", "D": "head_dim", "F": "intermediate_size"},
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One published matrix of one model: a row of NAMES with its layer and sizes filled in."""

    ours: str
    row: int  # where it starts in our tensor, along dim 0
    meta: str
    hf: str
    shape: tuple[int, ...]
    cut: int | None
    heads: int  # for q and k, whose rows are permuted; else 0
    letters: tuple[str, ...]

    def needs(self, format: str) -> str:
        """The shape in words, for an error: "(256, 64) from vocab_size, hidden_size"."""
        keys = [_KEYS[format][letter] for dim in self.letters for letter in dim.split("·")]
        return f"{self.shape} from {', '.join(dict.fromkeys(keys))}"


def weights(config: LlamaConfig) -> list[Weight]:
    """Every published matrix of a model, in the order of its layers; no head when it is tied."""
    sizes = {
        "V": config.vocab_size,
        "C": config.dim,
        "H·D": config.n_heads * config.head_dim,
        "K·D": config.n_kv_heads * config.head_dim,
        "F": config.hidden_dim,
    }
    heads = {"H": config.n_heads, "K": config.n_kv_heads, None: 0}
    first = next(i for i, name in enumerate(NAMES) if "{i}" in name.ours)
    last = max(i for i, name in enumerate(NAMES) if "{i}" in name.ours) + 1
    order = [(name, 0) for name in NAMES[:first]]
    order += [(name, i) for i in range(config.n_layers) for name in NAMES[first:last]]
    order += [(name, 0) for name in NAMES[last:] if not (config.tied and name.ours == HEAD)]

    result: list[Weight] = []
    for name, i in order:
        ours = name.ours.format(i=i)
        stacked = result and result[-1].ours == ours
        result.append(
            Weight(
                ours=ours,
                row=result[-1].row + result[-1].shape[0] if stacked else 0,
                meta=name.meta.format(i=i),
                hf=name.hf.format(i=i),
                shape=tuple(sizes[letters] for letters in name.shape),
                cut=name.cut,
                heads=heads[name.rotary],
                letters=name.shape,
            )
        )
    return result


def state_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of our state dict; a tied head is not listed apart."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights(config):
        shapes[weight.ours] = (weight.row + weight.shape[0], *weight.shape[1:])
    return shapes


def meta_to_hf_rows(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a q or k matrix as Hugging Face does; (heads·D, …), a copy.

    Meta turns neighbouring rows of a head together, Hugging Face rows half a head apart: within
    each head, row j there is row 2j here, and row D/2+j is row 2j+1. The B matrix of a LoRA on q
    or k is ordered in the same way.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hf_to_meta_rows(weight: Tensor, heads: int) -> Tensor:
    """Undo `meta_to_hf_rows`; (heads·D, …), a copy."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
