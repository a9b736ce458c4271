"""Loading and converting hold the tensors asked for and little besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fast.checkpoint import state_shapes, write_hf, write_meta
from llama_fast.checkpoint.quantized import quantized_bytes
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import NAMED

from . import resident_memory

CONFIG = LlamaConfig(
    dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, head_dim=64, hidden_dim=4096, vocab_size=32000
)
SMALL = replace(CONFIG, dim=64, n_layers=1, hidden_dim=64, vocab_size=64)
WEIGHTS = CONFIG.n_params * 2  # 252 MB in bfloat16
LARGEST = CONFIG.vocab_size * CONFIG.dim * 2
# Mapped pages between two releases (64 MiB), a block, and what torch allocates for itself.
SLACK = 110e6
# What blocks take that are rounded; less than the embedding as it is stored, 66 MB.
QUANTIZING = 60e6

_WORK = """
import torch
from llama_fast.checkpoint import convert, open_checkpoint, state_shapes
from llama_fast.model import Llama

def work(source, target):
    if target == "int8":
        Llama.from_pretrained(source, device="cpu", quantize="int8", max_seq_len=16)
    elif target == "memory":
        checkpoint = open_checkpoint(source)
        shapes = state_shapes(checkpoint.config)
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        checkpoint.load_into(state)
    else:
        convert(source, target, "hf" if "meta" in source else "meta")
"""
ASKED = [
    *((name, "memory") for name in ("hf", "hf-shards", "meta", "meta-2")),
    *((name, "int8") for name in ("hf", "meta")),
    *((name, "converted") for name in ("hf", "meta")),
]

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see the peak of memory"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights as one safetensors, as several, as one .pth and as two; and small ones."""
    folder = tmp_path_factory.mktemp("memory")
    value = {name: 2.0 if name == "head.weight" else 1.0 for name in state_shapes(CONFIG)}
    for config, small in ((CONFIG, ""), (SMALL, " small")):
        state = {
            name: torch.tensor(value[name], dtype=torch.bfloat16).expand(shape)
            for name, shape in state_shapes(config).items()
        }
        write_hf(folder / f"hf{small}", config, state)
        write_hf(folder / f"hf-shards{small}", config, state, max_shard_bytes=100_000_000)
        write_meta(folder / f"meta{small}", config, state)
        write_meta(folder / f"meta-2{small}", config, state, n_files=2)
    return folder


@pytest.fixture(scope="module")
def peaks(folders) -> dict[tuple[str, str], int]:
    """Bytes at most, by those of ASKED."""
    asked = [
        (folders / name, folders / f"{name} {kind}" if kind == "converted" else kind)
        for name, kind in ASKED
    ]
    return dict(zip(ASKED, resident_memory.peaks(_WORK, asked), strict=True))


@needs_proc
@pytest.mark.parametrize("name", ["hf", "hf-shards", "meta", "meta-2"])
def test_peak_of_loading(peaks, name):
    assert WEIGHTS < peaks[name, "memory"] < WEIGHTS + SLACK


@needs_proc
@pytest.mark.parametrize("name", ["hf", "meta"])
def test_peak_of_quantizing(peaks, name):
    """Neither a float matrix nor a second copy of a quantised one is ever held."""
    weights = quantized_bytes(CONFIG, NAMED["int8"])
    assert weights < peaks[name, "int8"] < weights + QUANTIZING


@needs_proc
@pytest.mark.parametrize("name", ["hf", "meta"])
def test_peak_of_converting(peaks, name):
    assert LARGEST < peaks[name, "converted"] < LARGEST + SLACK
