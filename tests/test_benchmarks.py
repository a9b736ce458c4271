"""The CPU benchmark measures what it says, in a tiny shape; figures are not looked at here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import bench_patch, cpu, memory, models
from benchmarks.worker import Worker, WorkerError
from llama_fast.bench import machine, results
from llama_fast.bench.report import write
from llama_fast.bench.results import Row
from llama_fast.bench.timing import OtherPrograms, interleaved, ratio, spread
from llama_fast.checkpoint import write_random
from llama_fast.config import LlamaConfig, RopeScaling
from llama_fast.errors import WrongResultError

_cpu = pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")
PEER = importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")
needs_llama_cpp = pytest.mark.skipif(
    not PEER, reason="llama-cpp-python and gguf are not installed: pip install '.[peers]'"
)

# pytest-benchmark measures nothing in a worker of pytest-xdist, nor in a process started by one.
ALONE = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Some rows of a run of two rounds, with every baseline that is installed."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    code = cpu.main(
        [
            *(
                "--rows",
                "decode bf16",
                "attention query",
                "call",
                "--shape",
                "demo",
                "--threads",
                "1",
            ),
            *("--rounds", "2", "--steps", "2", "--json", str(path)),
        ]
    )
    assert code == 0
    return path


def test_the_results_hold_every_sample_and_what_they_were_measured_with(measured):
    found = json.loads(measured.read_text())
    assert found["machine"]["isa"] == _cpu.isa() and found["machine"]["cores"] >= 1
    assert list(found["rows"]) == ["decode bf16", "attention query", "call"]
    assert set(found["rows"]["attention query"]["samples"]) == {"llama_fast", "SDPA", "plain read"}
    row = found["rows"]["decode bf16"]
    everybody = {"llama_fast", *models.WEIGHTS["bf16"].peers}
    absent = {name for name in everybody if models.missing(name)}
    assert set(row["samples"]) == everybody - absent | {"plain read"}
    assert set(row.get("missing", {})) == absent
    for name, seconds in row["samples"].items():
        assert len(seconds) == 2 and min(seconds) > 0
        assert row["medians"][name] == pytest.approx(2 / statistics.median(seconds), rel=1e-4)
    goals = {goal["what"]: goal for goal in row["goals"]}
    assert goals["× transformers"]["needed"] == 4.0
    assert goals["× transformers"]["value"] == pytest.approx(
        ratio(row["samples"], "transformers", "llama_fast"), rel=1e-4
    )
    assert goals["of read bandwidth"]["value"] == pytest.approx(
        ratio(row["samples"], "plain read", "llama_fast"), rel=1e-4
    )
    used = found["runs"][row["run"]]
    assert used["shape"] == "demo" and used["threads"] == 1
    assert used["versions"]["torch"] == metadata.version("torch")
    assert used["roofline"]["read"] > 1e8 and used["roofline"]["bfloat16"] > 1e8
    assert min(found["rows"]["call"]["medians"].values()) > 0


def test_unknown_rows_are_named(capsys):
    assert cpu.main(["--rows", "decode int3"]) == 1
    assert "no row decode int3; the rows are decode bf16" in capsys.readouterr().err


def test_peers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert models.missing("transformers").startswith("transformers not installed: pip install")
    assert models.missing("llama.cpp q8_0").startswith("llama_cpp and gguf not installed")
    assert models.missing("OpenVINO q8_0").startswith("openvino_genai and llama_cpp and gguf not")
    assert models.missing("ik_llama q4_0").startswith("ik_llama_cpp and llama_cpp and gguf not")
    assert models.missing("CTranslate2 int8").startswith("ctranslate2 and transformers not")
    assert models.missing("llama_fast") is None


# --- a wrong baseline is refused -------------------------------------------------------------

TINY = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=600,
    max_seq_len=64,
    rope_scaling=RopeScaling(8.0, original_max_seq_len=32),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_random(folder / "weights", TINY)
    return models.Models(TINY, folder, 1, 1, 32, 2, lambda text: None)


class Fixed:
    """Stands for a worker whose baseline gives these logits."""

    def __init__(self, logits):
        self.logits = logits

    def ask(self, method, *arguments):
        return self.logits


def test_wrong_logits_are_refused(tiny):
    tokens = models.prompt_of(tiny, 8)
    right = tiny.reference(tokens)
    row = Row("decode bf16", "", "tok/s")
    models.check(tiny, row, "bf16", Fixed(right * 1.01), "sound", tokens, 0)
    with pytest.raises(WrongResultError, match="its time means nothing"):
        models.check(tiny, row, "bf16", Fixed(right * 1.1), "wrong", tokens, 0)
    with pytest.raises(WrongResultError):
        models.check(tiny, row, "bf16", Fixed(right * float("nan")), "broken", tokens, 0)


@needs_llama_cpp
def test_llama_cpp_runs_the_same_model(tiny):
    """Names, rotation, its scaling, norms: all of the GGUF is right when the logits are."""
    tokens = models.prompt_of(tiny, 40)
    for kind, form in (("bf16", "bf16"), ("q8_0", "int8")):
        row = Row("decode", "", "tok/s")
        with tiny.start(f"llama.cpp {kind}", models.WEIGHTS[form], 64) as worker:
            try:
                models.check(tiny, row, form, worker, kind, tokens, 4)
            except WorkerError as error:
                if error.kind != "EOFError" or kind == "bf16" or "amx" not in _cpu.isas():
                    raise
                pytest.skip("llama.cpp 0.3.36 dies of quantised weights on AMX")
    assert not list(tiny.folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["ik_llama q8_0", "OpenVINO q8_0", "CTranslate2 int8"])
def test_other_engines_run_the_same_model(tiny, name):
    """And go on with it, as many tokens as are asked for: what makes none must not be timed."""
    if why := models.missing(name):
        pytest.skip(why)
    tokens = models.prompt_of(tiny, 40)
    with tiny.start(name, models.WEIGHTS["int8"], 64) as worker:
        models.check(tiny, Row("prefill", "", "tok/s"), "int8", worker, name, tokens, 0)
        worker.ask("prefill", tokens)
        models.check(tiny, Row("decode", "", "tok/s"), "int8", worker, name, tokens, 4)
        worker.ask("decode", 4)
        worker.ask("decode", 4)


def test_a_peer_that_dies_takes_no_part(tiny):
    row = Row("decode bf16", "", "tok/s")
    tokens = models.prompt_of(tiny, 8)
    with Worker(Dying, threads=1) as worker:
        workers = {"llama.cpp bf16": worker}
        models.prepare(tiny, row, "bf16", workers, tokens, 0, 0)
        assert workers == {} and "code 3" in row.missing["llama.cpp bf16"]
    with Worker(Dying, threads=1) as worker, pytest.raises(WorkerError, match="code 3"):
        models.prepare(tiny, row, "bf16", {models.OURS: worker}, tokens, 0, 0)


# --- workers ----------------------------------------------------------------------------------


class Dying:
    def choose_flash_attention(self, tokens, steps):
        os._exit(3)

    def logits_after(self, tokens, steps):
        os._exit(3)


class Calculator:
    def __init__(self, start):
        if start < 0:
            raise ValueError("below zero")
        self.value = start

    def add(self, more):
        self.value += more
        return self.value

    def leave(self):
        os._exit(3)


def test_a_worker_keeps_its_baseline():
    with Worker(Calculator, 1, threads=1) as worker:
        assert worker.ask("add", 2) == 3 and worker.ask("add", 2) == 5
        with pytest.raises(WorkerError, match="unsupported operand"):
            worker.ask("add", "two")
        assert worker.ask("add", 1) == 6
        with pytest.raises(WorkerError, match="ended with code 3"):
            worker.ask("leave")
    with pytest.raises(WorkerError, match="below zero") as caught:
        Worker(Calculator, -1, threads=1)
    assert caught.value.kind == "ValueError"


# --- figures ----------------------------------------------------------------------------------


def test_every_baseline_takes_its_turn():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = interleaved(calls, rounds=3)
    assert turns == ["a", "b"] * 4
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_and_spread():
    seconds = {"slow": [4.0, 6.0, 100.0], "fast": [2.0, 2.0, 2.0]}
    assert ratio(seconds, "slow", "fast") == 3.0
    assert spread([1.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    row = Row("x", "", "tok/s", 10.0, {"a": [1.0, 1.01, 1.02]})
    assert not row.too_noisy
    row.samples["b"] = [1.0, 2.0, 3.0]
    assert row.medians() == {"a": pytest.approx(10 / 1.01), "b": 5.0}
    assert row.too_noisy == ["the samples of b spread over 50% of their median"]
    row = Row("x", "", "tok/s", 10.0, {"a": [1.0]}, others=0.5)
    assert row.too_noisy == ["other programs took 50% of the processors' time"]


def test_other_programs_are_seen():
    """Our own work is not counted when it is said to be ours, and is when it is not."""
    shares = []
    for processes in ([os.getpid()], []):
        with OtherPrograms(processes) as others:
            start = time.process_time()
            while time.process_time() - start < 0.5:
                pass
        shares.append(others.share)
    if None in shares:
        pytest.skip("this system has no /proc/stat")
    assert shares[1] > shares[0] and shares[1] > 0.2 / os.cpu_count()


HELD = """
import torch
from benchmarks import isa, models
from benchmarks.worker import run_apart
def found():
    from llama_fast.backends import cpu
    return cpu.isa(), torch.backends.cpu.get_cpu_capability()
if __name__ == "__main__":
    isa.hold_to("avx2")
    print(*run_apart(found, threads=1), "|", models.missing("llama.cpp q4_0"))
"""


@pytest.mark.skipif("avx2" not in _cpu.isas(), reason="this needs a CPU with AVX2")
def test_ours_torch_and_llama_cpp_are_held_to_an_instruction_set(tmp_path):
    program = tmp_path / "held.py"
    program.write_text(HELD)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, _, why = done.stdout.strip().partition(" | ")
    assert found == "avx2 AVX2"
    if not (root / "build" / "llama-cpp-avx2").is_dir():
        assert "make build/llama-cpp-avx2" in why


def test_a_machine_has_a_name_for_its_file():
    found = {"cpu": "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz", "isa": "avx512"}
    found["flags"] = ["avx2", "avx512_vnni"]
    expected = "intel-xeon-gold-6330-cpu-2.00ghz-avx512-vnni-2-threads"
    assert machine.file_name(found, 2) == expected
    assert "gold-6330-cpu-2.00ghz-avx2-2" in machine.file_name({**found, "isa": "avx2"}, 2)
    found["gpus"] = ["NVIDIA H200", "NVIDIA L4"]
    assert machine.file_name(found, 2, "cuda") == "nvidia-h200"
    assert machine.file_name(found, 2, "cuda:1") == "nvidia-l4"


# --- pytest benchmarks/ -----------------------------------------------------------------------


NORM = "rms_norm and decode and not add and (cpu or eager)"


def run_suite(storage: Path, which: str, *flags: str) -> subprocess.CompletedProcess:
    """In a process of its own: pytest-benchmark lets a session be measured once."""
    options = ("--shapes", "demo", "--layers", "1", "--tokens", "24", "--rounds", "3")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "-k", which, "--threads", "1"),
            *(*options, f"--benchmark-storage=file://{storage}", *flags),
        ],
        cwd=Path(__file__).parent.parent,
        env=ALONE,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """The folder of a run: out.json, and the same as the plugin saves it."""
    folder = tmp_path_factory.mktemp("suite")
    flags = (f"--benchmark-json={folder / 'out.json'}", "--benchmark-save=before")
    done = run_suite(folder, f"test_model or ({NORM})", *flags, "--benchmark-autosave")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_pytest_suite_writes_its_fields(suite):
    path = suite / "out.json"
    content = json.loads(path.read_text())
    assert content["machine_info"]["llama_fast"]["isa"] == _cpu.isa()
    run = content["llama_fast"]
    assert run["roofline"]["read"] > 1e8 and run["versions"]["torch"] and run["threads"] == 1
    groups: dict[str, dict] = {}
    for entry in content["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["baseline"]] = entry
    rows = results.load(path).rows
    assert set(rows) == set(groups)
    for group, entries in groups.items():
        assert len(entries) >= 2 and set(rows[group].samples) == set(entries)
        for name, entry in entries.items():
            info, median = entry["extra_info"], entry["stats"]["median"]
            assert rows[group].samples[name] == pytest.approx(entry["stats"]["data"])
            assert len(entry["stats"]["data"]) == 3 and median > 0
            if info["bytes"]:
                rate = info["bytes"] / median / 1e9
                assert info["gigabytes_per_second"] == pytest.approx(rate)
            if info["flops"]:
                assert info["teraflops"] == pytest.approx(info["flops"] / median / 1e12)
            if "load" not in group:
                assert info["bound"] and 0 < info["part_of_peak"] < 5
                assert 0 < info["error_against_float64"] < 1
    norm = groups.pop("rms_norm, demo, decode, 1 token, 8192 keys, bfloat16, forward")
    assert set(norm) == {"cpu", "eager"}
    info = norm["cpu"]["extra_info"]
    assert info["bytes"] == 3 * models.shape("demo").dim * 2 and info["bound"] == "copy"
    assert info["host_seconds"] > 0 and info["times_eager"] > 0
    assert info["error_against_float64"] < 0.02
    kinds = {group.partition(",")[0] for group in groups}
    assert kinds == {"decode", "prefill", "load", "training step"}
    assert "transformers" in groups["training step, demo, whole model"]


def test_runs_are_compared_by_the_plugin(suite, tmp_path):
    """Its own flags: a run is saved, and the next one is held against it, test by test."""
    pytest.importorskip("pygal", reason="histograms need pygal: '.[test]'")
    (saved,) = suite.glob("*/0001_*.json")
    path = tmp_path / saved.parent.name / saved.name
    path.parent.mkdir()
    shutil.copy(saved, path)
    content = json.loads(path.read_text())
    for entry in content["benchmarks"]:  # one was a thousand times slower, one faster
        factor = 1e3 if entry["extra_info"]["baseline"] == "cpu" else 1e-3
        entry["stats"]["median"] *= factor
    path.write_text(json.dumps(content))
    found = run_suite(
        *(tmp_path, NORM, "--benchmark-compare", "--benchmark-compare-fail=median:15%"),
        f"--benchmark-histogram={tmp_path}/bars",
    )
    said = found.stdout + found.stderr
    assert found.returncode == 1 and "Performance has regressed" in said, said
    assert "Traceback" not in said, said
    worse = [line for line in said.splitlines() if "Field 'median'" in line]
    assert len(worse) == 1 and "eager" in worse[0], said
    assert "machine_info is different" not in said
    assert list(tmp_path.glob("bars*.svg"))


def test_the_rows_of_memory(tmp_path):
    made = models.Models(models.shape("demo"), tmp_path, 1, 1, 8, 2, print)
    row = memory.peak(made, "demo", "int8", "int8", 1.0)
    assert row.name == "memory demo int8" and 0.05 < row.samples[results.OURS][0] < 5
    prompt = memory.prompt(made.config, 256, 1, 1.0)
    assert 0 <= prompt.samples[results.OURS][0] < 1 and prompt.goals[0].needed == 1.0


# --- a patched transformers model -------------------------------------------------------------


def test_a_patched_model_beside_transformers(tmp_path, capsys):
    """Rows that the report shows, with the goals; who cannot run here is missing by name."""
    pytest.importorskip("transformers", reason="transformers is not installed: '.[test]'")
    path = tmp_path / "results.json"
    sizes = ("--shape", "demo", "--layers", "1", "--tokens", "8", "--steps", "2", "--rounds", "2")
    who = ("--contenders", "llama_fast", "transformers", "liger-kernel", "--threads", "1")
    assert bench_patch.main([*sizes, *who, "--device", "cpu", "--json", str(path)]) == 0
    rows = results.load(path).rows
    assert list(rows) == [
        "patched prefill, demo with 1 layer, 8 tokens",
        "patched decode, demo with 1 layer",
        "patched training step, demo with 1 layer, 8 tokens",
    ]
    for row, needed in zip(rows.values(), (1.15, 2.5, 1.0), strict=True):
        assert set(row.samples) == {"llama_fast", "transformers"} and row.own() == "llama_fast"
        assert "liger-kernel" in row.missing and len(row.samples["llama_fast"]) == 2
        (goal,) = row.goals
        assert (goal.what, goal.needed) == ("× transformers", needed) and goal.value > 0
        assert row.measured_with["roofline"]["read"] > 1e8
    assert bench_patch.why_not("liger-kernel", "cpu")
    page = write([results.load(path)], tmp_path / "report", figures=False).page.read_text()
    assert "| patched decode, demo with 1 layer, beside transformers as it is |" in page


def test_a_model_that_computes_something_else_has_no_time():
    class Says:
        closed = False

        def __init__(self, value: float) -> None:
            self.value = torch.tensor([1.0, value])

        def ask(self, method: str, row: str) -> torch.Tensor:
            return self.value

        def close(self) -> None:
            self.closed = True

    wrong = Says(3.0)
    workers = {"llama_fast": wrong, "torch.compile": Says(2.01), "transformers": Says(2.0)}
    row = Row("decode", "", "tok/s")
    bench_patch.compare("decode", workers, row)
    assert set(workers) == {"torch.compile", "transformers"} and wrong.closed
    assert "its time means nothing" in row.missing["llama_fast"]
