"""The tests of llama_fast.hf once more, with the oldest transformers that is supported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

VERSION = "4.56.2"
# It and what it needs in other versions than a newer transformers does; the rest is shared.
REQUIREMENTS = (f"transformers=={VERSION}", "tokenizers==0.22.1", "huggingface_hub==0.35.3")
RUN = """
import pytest, sys, transformers
assert transformers.__version__ == sys.argv[1], transformers.__version__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="session")
def folder(pytestconfig):
    """A folder with the older packages, made once and kept with pytest's cache."""
    made = pytestconfig.cache.mkdir(f"transformers-{VERSION}")
    done = made / "complete"
    if not done.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        run = subprocess.run(
            [*install, "--target", str(made), *REQUIREMENTS], capture_output=True, text=True
        )
        if run.returncode:
            pytest.skip(f"needs pip and an index to install {REQUIREMENTS[0]}: {run.stderr[-300:]}")
        done.touch()
    return made


def test_with_the_oldest_supported_transformers(folder, request):
    # Compiling takes a third of the time and meets the same forwards.
    chosen = ["--all"] if request.config.getoption("--all") else ["-k", "not TestCompile"]
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            VERSION,
            "tests/test_hf.py",
            "tests/test_hf_around.py",
            *chosen,
        ],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
