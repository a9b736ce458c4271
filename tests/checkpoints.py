"""Small checkpoints for the tests, made without the package's own writers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from llama_fast.checkpoint import Checkpoint, state_shapes
from llama_fast.config import LlamaConfig

# Every size that several files share divides by 4.
SMALL = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=176, vocab_size=320
)

# What the tests of commands run on.
TINY = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    vocab_size=600,
    max_seq_len=96,
    tied=True,
)

_CUT_BY_COLUMNS = ("wo.weight", "w2.weight")


def random_state(
    config: LlamaConfig, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """A state dict with our names."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in state_shapes(config).items()
    }


def meta_state(config: LlamaConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under Meta's names and in Meta's order of rotary rows."""

    def rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
        pairs = weight.view(heads, 2, config.head_dim // 2, config.dim)
        return pairs.transpose(1, 2).reshape(heads * config.head_dim, config.dim)

    result = {"tok_embeddings.weight": state["embed.weight"]}
    kv_rows = config.n_kv_heads * config.head_dim
    for i in range(config.n_layers):
        ours, layer = f"layers.{i}.", f"layers.{i}."
        qkv = state[ours + "attention.qkv.weight"]
        q, k, v = qkv.split([config.n_heads * config.head_dim, kv_rows, kv_rows])
        gate, up = state[ours + "mlp.gate_up.weight"].chunk(2)
        result |= {
            layer + "attention.wq.weight": rotary(q, config.n_heads),
            layer + "attention.wk.weight": rotary(k, config.n_kv_heads),
            layer + "attention.wv.weight": v,
            layer + "attention.wo.weight": state[ours + "attention.output.weight"],
            layer + "feed_forward.w1.weight": gate,
            layer + "feed_forward.w3.weight": up,
            layer + "feed_forward.w2.weight": state[ours + "mlp.down.weight"],
            layer + "attention_norm.weight": state[ours + "attention_norm.weight"],
            layer + "ffn_norm.weight": state[ours + "mlp_norm.weight"],
        }
    result["norm.weight"] = state["norm.weight"]
    result["output.weight"] = state.get("head.weight", state["embed.weight"])
    return {key: tensor.clone() for key, tensor in result.items()}


def meta_files(
    stored: dict[str, torch.Tensor], n_files: int, skip: Iterable[str] = ()
) -> list[dict[str, torch.Tensor]]:
    """Cut Meta's matrices over several files, as FACTS section 2 says."""
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(n_files)]
    for key, tensor in stored.items():
        if key.endswith(tuple(skip)):
            continue
        if "norm" in key:
            cuts = [tensor] * n_files
        else:
            cuts = list(tensor.chunk(n_files, 1 if key.endswith(_CUT_BY_COLUMNS) else 0))
        for file, cut in zip(files, cuts, strict=True):
            file[key] = cut.clone()
    return files


def save_meta(folder: Path, params: dict, files: list) -> None:
    """params.json and consolidated.00.pth …, written by torch.save."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, content in enumerate(files):
        torch.save(content, folder / f"consolidated.{i:02d}.pth")


def load(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Load into memory that was poisoned beforehand."""
    state = {
        name: torch.full(shape, torch.nan, dtype=dtype or checkpoint.dtype)
        for name, shape in state_shapes(checkpoint.config).items()
    }
    checkpoint.load_into(state)
    return state
