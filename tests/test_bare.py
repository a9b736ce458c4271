"""`make gpu` in a bare checkout, in an environment in which the project was never installed: its
rehearsal runs every kernel of every part, and writes rows that the report shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import ops, run, tests_apart
from benchmarks.gpu.parts import PARTS, STAGES
from benchmarks.gpu.setting import TINY
from llama_fast.bench import results
from llama_fast.cli import main
from llama_fast.dispatch import backends

from . import bare
from .cuda_host import host

pytest.importorskip("triton", reason="Triton is not installed: its kernels take part")
SERVED = "rms_norm-odd-bfloat16-triton"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Not compiled for the CPU; what was compiled of CUDA's kernels for the host comes along."""
    folder = bare.export(tmp_path_factory.mktemp("bare") / "llama_fast")
    if not host.why_not():
        built = host.build_as(host.RACES).parent
        shutil.copytree(built, folder / built.relative_to(bare.ROOT))
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return bare.environment(tmp_path_factory.mktemp("environment"))


def run_there(checkout: Path, *command: object, **environment: str) -> str:
    """What the command says, in the checkout."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(word) for word in command], cwd=checkout, env=inherited | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_of_the_project_is_installed_there(checkout, python, tmp_path):
    find = "import importlib.util as u; print(u.find_spec('llama_fast'), u.find_spec('torch'))"
    assert run_there(tmp_path, python, "-c", find).startswith("None ModuleSpec")
    where = run_there(checkout, python, "-c", "import llama_fast; print(llama_fast.__file__)")
    assert Path(where.strip()).parent.parent == checkout
    assert not list(checkout.glob("llama_fast/_c*.so"))


def test_the_rehearsal_from_end_to_end(checkout, python, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = f"all --device cpu --out {out}"
    said = run_there(checkout, "make", "gpu", f"PYTHON={python}", f"ARGS={arguments}")
    assert f"all that is to be kept is in {out}" in said
    assert "ImportError" not in said and "ModuleNotFoundError" not in said, said
    assert {path.name for path in out.iterdir()} == {"rehearsal.json", run.LOG, tests_apart.TESTS}
    assert SERVED in (out / tests_apart.TESTS).read_text()
    log = (out / run.LOG).read_text()
    found = results.load(out / "rehearsal.json").rows
    for name in dict.fromkeys(part for parts in STAGES.values() for part in parts):
        assert f"== part {name}: done" in log and found[f"part {name}"].notes
    assert set(PARTS) <= {name.removeprefix("part ") for name in found}
    for kind, calls in ops.CALLS.items():
        for call in calls(TINY):
            row = found[ops.name_of(call, TINY)]
            has_it = call.op in backends()["triton"].implementations
            assert ("triton" in row.samples) == has_it, (kind, row.missing)
            assert len(row.goals) == len(call.targets)
    rows = [row for row in found.values() if row.samples]
    own = {"triton"} if host.why_not() else {"cuda", "triton"}
    assert own | {"eager"} <= set(found[decoded("int8")].samples)
    assert all(row.measured_with["versions"]["torch"] for row in rows)
    attention = found["attention, tiny, training, 32 tokens, bfloat16, forward"]
    assert "llama_fast cuda warpgroups" in attention.samples or "cuda" in attention.missing
    timed = found["rms_norm, tiny, prefill, 4 tokens, bfloat16, forward"].goals[0]
    assert timed.at_most and timed.needed == 1.0
    assert found[decoded("int4")].goals[0].needed == 0.75
    (trained,) = (row for name, row in found.items() if name.startswith("patched training"))
    assert {"llama_fast", "transformers"} == set(trained.samples) and trained.memory

    monkeypatch.chdir(tmp_path)
    assert main(["report", str(out / "rehearsal.json")]) == 0
    page = Path("report/report.md").read_text()
    assert "- part graph: done" in page
    for kind in ("speed-ups", "attention"):
        assert f"-{kind}.png)" in page and list(Path("report").glob(f"*-{kind}.png"))


def decoded(form: str) -> str:
    return f"decode {form}, tiny with 1 layer, behind 8 tokens"


def test_packages_in_a_folder_of_the_caller_s_are_found(checkout, python, tmp_path):
    """Peers that are brought to a machine without a network: PYTHONPATH reaches every part."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, pathlib\n"
        f"with open({str(tmp_path / 'started')!r}, 'a') as file:\n"
        "    print(*sys.orig_argv, file=file)\n"
    )
    arguments = f"--device cpu --parts sanitizers --out {tmp_path / 'out'}"  # which has none here
    run_there(
        checkout, "make", "gpu", f"PYTHON={python}", f"ARGS={arguments}", PYTHONPATH=str(tmp_path)
    )
    started = (tmp_path / "started").read_text()
    assert "-m benchmarks.gpu" in started and "forkserver" in started
