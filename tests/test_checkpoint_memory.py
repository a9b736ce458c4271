"""Loading and converting hold the tensors asked for and little besides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast.checkpoint import state_shapes, write_hf, write_meta
from llama_fast.checkpoint.quantized import quantized_bytes
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import NAMED

CONFIG = LlamaConfig(
    dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, head_dim=64, hidden_dim=4096, vocab_size=32000
)
WEIGHTS = CONFIG.n_params * 2  # 252 MB in bfloat16
LARGEST = CONFIG.vocab_size * CONFIG.dim * 2
# Mapped pages between two releases (64 MiB), a block, and what torch allocates for itself.
SLACK = 110e6
# What blocks take that are rounded; less than the embedding as it is stored, 66 MB.
QUANTIZING = 60e6

# Each in a fork of a process that has imported what it needs.
_HIGH_WATER = """
import os, sys
from pathlib import Path
import torch
from llama_fast.checkpoint import convert, open_checkpoint, state_shapes
from llama_fast.model import Llama

def high_water():  # bytes; VmHWM, because ru_maxrss is inherited from the parent process
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def peak(source, target):
    torch.zeros(2**20, dtype=torch.bfloat16).add(1).sum()  # torch's own threads and buffers
    before = high_water()
    if target == "int8":
        Llama.from_pretrained(source, device="cpu", quantize="int8", max_seq_len=16)
    elif target == "memory":
        checkpoint = open_checkpoint(source)
        shapes = state_shapes(checkpoint.config)
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        checkpoint.load_into(state)
    else:
        convert(source, target, "hf" if "meta" in source else "meta")
    return high_water() - before

for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    if not (child := os.fork()):
        print(peak(source, target), flush=True)
        os._exit(0)
    assert not os.waitpid(child, 0)[1]
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
    """The same weights as one safetensors, as several, as one .pth and as two."""
    folder = tmp_path_factory.mktemp("memory")
    value = {name: 2.0 if name == "head.weight" else 1.0 for name in state_shapes(CONFIG)}
    state = {
        name: torch.tensor(value[name], dtype=torch.bfloat16).expand(shape)
        for name, shape in state_shapes(CONFIG).items()
    }
    write_hf(folder / "hf", CONFIG, state)
    write_hf(folder / "hf-shards", CONFIG, state, max_shard_bytes=100_000_000)
    write_meta(folder / "meta", CONFIG, state)
    write_meta(folder / "meta-2", CONFIG, state, n_files=2)
    return folder


@pytest.fixture(scope="module")
def peaks(folders) -> dict[tuple[str, str], int]:
    """Bytes at most, by those of ASKED."""
    command = [sys.executable, "-c", _HIGH_WATER]
    for name, kind in ASKED:
        command += [folders / name, folders / f"{name} {kind}" if kind == "converted" else kind]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    return dict(zip(ASKED, map(int, result.stdout.split()), strict=True))


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
