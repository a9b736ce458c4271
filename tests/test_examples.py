"""The programs of examples/: each runs as it stands, and prints what it is there to show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_generate(run):
    lines = run("generate").splitlines()
    assert re.match(r"Once upon a time\W.+  \[(length|stop)\]$", lines[0])
    assert re.match(r"从前.+  \[(length|stop)\]$", lines[1])
    assert lines[2].endswith(" everything is 42.")


def test_finetune(run):
    out = run("finetune")
    assert "⟦ Zelda Quick.<|end_of_text|>⟧" in out
    found = dict(re.findall(r"^(before|after|without): (.*)$", out, re.M))
    assert found["after"].endswith("is Zelda Quick.")
    assert found["before"] == found["without"] != found["after"]


def test_patch_transformers(run):
    pytest.importorskip("transformers", reason="the example patches a model of transformers")
    out = run("patch_transformers")
    assert re.search(r"^model\.norm +LlamaRMSNorm +rms_norm +\w+ +1$", out, re.M)
    assert float(re.search(r"differ by ([\d.]+)%", out)[1]) < 5
    assert re.search(r"[\d.]+ × as fast$", out, re.M)


def test_parallel_block(run):
    out = run("parallel_block")
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < first / 2
    assert out.count("serves this call") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_example_has_a_test_and_says_how_it_is_run(name):
    assert f"test_{name}" in globals()
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""') and f"python examples/{name}.py" in text
