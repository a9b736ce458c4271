"""Before anything imports torch or Triton: a worker of pytest-xdist takes one thread, and without a
GPU Triton's kernels run in its interpreter. And `--all`: see selection.py."""

from __future__ import annotations

import importlib.util
import io
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # the other worker has the other core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llama_fast.cli import main as command_line
from llama_fast.utils.environment import triton_interpreter
from tests.selection import runs_all, short_run
from tests.triton_interpreter import be_quick, behave_as_a_gpu

if triton_interpreter():
    behave_as_a_gpu()
    be_quick()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every dtype in full on every backend")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            "workers collect tests by their names, and these have an address in it; give ids: "
            + ", ".join(addresses)
        )
    if runs_all(config):
        return
    kept = short_run(items)
    left = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = command_line([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
