"""Without the compiled module, or with one that cannot be loaded: all works, and one warning says
why it is slow."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

from llama_fast import dispatch, rms_norm, swiglu, use_backend
from llama_fast.dispatch import choice
from llama_fast.errors import BackendError, FallbackWarning

PACKAGE = Path(__file__).parent.parent / "llama_fast"
WHY = "its C++ kernels cannot be loaded: made of cheese"


@pytest.fixture
def unloadable(monkeypatch):
    """The backend of the CPU as it is registered where its module cannot be loaded."""
    before = dispatch.backends()["cpu"]
    monkeypatch.setattr(choice, "_warned", set())
    dispatch.register_backend(dataclasses.replace(before, unavailable=[WHY], recorder=None))
    yield
    dispatch.register_backend(before)


def call() -> list[str]:
    """Calls of several ops and kinds: the warnings that they gave."""
    x, weight = torch.ones(2, 8), torch.ones(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rms_norm(x, weight)
        rms_norm(x[:1], weight)
        rms_norm(x, weight.clone().requires_grad_()).sum().backward()
        with torch.inference_mode():
            swiglu(x, x)
        torch.ops.llama_fast.swiglu(x, x)
    assert all(one.category is FallbackWarning for one in caught)
    return [str(one.message) for one in caught]


def test_one_warning_for_all_ops(unloadable):
    (said,) = call()
    assert said == (
        "ops on cpu tensors run on the eager backend, because none before it can be used here: "
        f"cpu: {WHY}"
    )
    assert call() == []


def test_a_warning_points_at_the_call(unloadable):
    with pytest.warns(FallbackWarning) as caught:
        rms_norm(torch.ones(2, 8), torch.ones(8))
    assert caught[0].filename == __file__


def test_eager_that_was_asked_for_is_no_fallback(unloadable):
    with use_backend("eager"):
        assert call() == []


def test_a_backend_that_was_asked_for_is_missed(unloadable):
    with use_backend("cpu"):
        (said,) = call()
    assert WHY in said
    with use_backend("cpu", strict=True), pytest.raises(BackendError, match="made of cheese"):
        rms_norm(torch.ones(2, 8), torch.ones(8))


def test_a_device_that_has_a_backend_is_silent():
    assert call() == []


MODULE = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")


@pytest.mark.parametrize(
    ("module", "content", "says"),
    [
        ("", b"", "its C++ kernels are not built"),
        (MODULE, b"no ELF", r"its C++ kernels cannot be loaded: "),
        ("_cpu.cpython-36m-here.so", b"", "built for another Python (_cpu.cpython-36m-here.so)"),
    ],
)
def test_python_and_the_command_line_say_it_once(tmp_path, module, content, says):
    shutil.copytree(
        PACKAGE, tmp_path / "llama_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if module:
        (tmp_path / "llama_fast" / module).write_bytes(content)
    program = (
        "import warnings, torch, llama_fast\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    y = llama_fast.rms_norm(torch.ones(1, 4), torch.ones(4)).sum().item()\n"
        "    llama_fast.swiglu(torch.ones(1, 4), torch.ones(1, 4))\n"
        "caught = [str(one.message) for one in caught]\n"
        "print('RESULT', round(y), caught)\n"
        "from llama_fast.cli import main\n"
        "llama_fast.dispatch.choice._warned.clear()\n"
        "llama_fast.dispatch.register_backend(llama_fast.dispatch.backends()['cpu'])\n"
        "main(['generate', 'Once upon', '-n', '2', '--seed', '1', '-q'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert result.startswith("RESULT 4 ['ops on cpu tensors run on the eager backend")
    assert result.count("ops on cpu") == 1 and says in result
    notes = [line for line in done.stderr.splitlines() if "llama-fast: note: " in line]
    assert len(notes) == 1 and says in notes[0], done.stderr
