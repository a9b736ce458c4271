"""`make gpu` without a GPU: its rehearsal writes rows that the report shows, and neither a kernel
that fails nor one that kills its process or hangs takes the other rows along."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import goals, ops, part, run
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import Ended
from benchmarks.gpu.setting import LARGE, TINY, Setting
from llama_fast.bench import results
from llama_fast.bench.results import Row
from llama_fast.bench.roofline import Ceilings
from llama_fast.cli import main
from llama_fast.dispatch import backends

pytest.importorskip("triton", reason="Triton is not installed: its kernels take part")
CEILINGS = Ceilings("cpu", 1, None, 1e9, 1e9, 1e9, 1e9)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", tmp_path / "lines.jsonl", CEILINGS)


def rehearse(path: Path, *parts: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--json", str(path)]
    done = subprocess.run(
        [*command, "--parts", ",".join(parts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rehearsal_from_end_to_end(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    parts = [name for name in PARTS if name not in ("tests", "cuda_tests")]  # this suite has them
    said = rehearse(path, *parts)
    found = results.load(path).rows
    for name in parts:
        assert f"== part {name}: done" in said and found[f"part {name}"].notes
    for kind, calls in ops.CALLS.items():
        for call in calls(TINY):
            row = found[ops.name_of(call, TINY)]
            has_it = call.op in backends()["triton"].implementations
            assert ("triton" in row.samples) == has_it, kind
            assert len(row.goals) == len(call.targets)
    rows = [row for row in found.values() if row.samples]
    assert {"cuda", "triton", "eager"} <= set(rows[0].samples)
    assert all(row.measured_with["versions"]["torch"] for row in rows)
    attention = found["attention, tiny, training, 32 tokens, bfloat16, forward"]
    assert "llama_fast cuda warpgroups" in attention.samples or "cuda" in attention.missing
    host = found["rms_norm, tiny, prefill, 4 tokens, bfloat16, forward"].goals[0]
    assert host.value > 0 and host.at_most
    assert found["decode int4, tiny with 1 layer, behind 8 tokens"].goals[0].needed == 0.75
    (trained,) = (row for name, row in found.items() if name.startswith("patched training"))
    assert {"llama_fast", "transformers"} == set(trained.samples) and trained.memory

    monkeypatch.chdir(tmp_path)
    assert main(["report", "gpu.json"]) == 0
    page = Path("report/report.md").read_text()
    assert "of bandwidth (goal ≥ 0.95" in page and "- part graph: done" in page
    for kind in ("roofline", "speed-ups", "attention"):
        assert f"-{kind}.png)" in page and list(Path("report").glob(f"*-{kind}.png"))


# --- what a part survives ---------------------------------------------------------------------


def begin(setting, starts, seconds=60.0):
    """Runs a part whose processes say what `starts` has; returns why it failed, the rows, and what
    was left out of each process."""
    kept, without, upcoming = [], [], iter(starts)

    def start(name, given, seconds):
        without.append(dict(given.without))
        yield from next(upcoming)

    deadline = time.monotonic() + seconds
    why = run.run_part("attention", setting, deadline, lambda row: kept.append(row.name), start)
    return why, kept, without


def a_row(name: str) -> Row:
    return Row(name, name, "GB/s")


def test_what_kills_the_process_is_left_out_of_the_next(setting):
    died = Ended("illegal address", died=True, culprit="triton")
    why, kept, without = begin(setting, [[a_row("a"), died], [a_row("b"), Ended()]])
    assert kept == ["a", "b"] and without[0] == {} and list(without[1]) == ["triton"]
    assert "illegal address" in why and "illegal address" in without[1]["triton"]


def test_where_nobody_is_named_our_kernels_are_left_out_one_after_another(setting):
    died = Ended("it hung", died=True)
    why, kept, without = begin(setting, [[died], [died], [a_row("a"), Ended()]])
    assert [list(names) for names in without] == [[], ["cuda"], ["cuda", "triton"]]
    assert kept == ["a"] and why.count("it hung") == 2
    why, kept, without = begin(setting, [[died]] * 3)
    assert len(without) == 3 and why.count("it hung") == 3  # then the part is given up


def test_failures_do_not_start_a_part_anew(setting):
    assert begin(setting, [[a_row("a"), Ended("one row failed")]])[:2] == ("one row failed", ["a"])
    assert begin(setting, [], seconds=1.0)[0] == "no time was left"


@pytest.mark.parametrize("who", ["cuda", "llama_fast cuda warpgroups"])
def test_what_was_left_out_is_missing_from_the_row(setting, who):
    setting.without[who] = "a process ended with it"
    call = ops.attention(TINY)[0]
    failed: dict[str, Exception] = {}
    with part.kernels(setting):
        row = ops.row(call, setting, failed)
    assert not failed and who not in row.samples and "triton" in row.samples
    assert row.missing[who] == "a process ended with it"
    if who != "cuda" and "cuda" not in row.missing:
        assert "cuda" in row.samples


def test_a_process_that_ends_in_a_row_says_which(setting, monkeypatch):
    """A real one: a row that hangs is ended with a traceback, and what was measured is kept."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu import part, setting\n"
        "from llama_fast.bench.results import Row\n"
        "found, _ = setting.Setting.load(Path(sys.argv[1]))\n"
        "row = Row('right', 'right', 'GB/s')\n"
        "rows = {'right': lambda failed: row, 'hangs': lambda failed: time.sleep(60)}\n"
        "part.measured(found, rows, 0.5)\n"
    )
    real = subprocess.Popen

    def popen(command, **more):
        return real([sys.executable, "-c", code, command[-1]], **more)

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    row, ended = run.start_process("attention", setting, 60.0)
    assert row.name == "right" and ended.died and ended.culprit is None
    assert "its process ended at hangs" in ended.why and "Timeout" in ended.why
    (ended,) = run.start_process("attention", setting, 0.0)
    assert "stopped after 0 s" in ended.why and not ended.died


def test_a_row_that_fails_leaves_the_others(setting):
    def fails(failed):
        raise ValueError("no such thing")

    def half(failed):
        failed["triton"] = RuntimeError("out of resources")
        return a_row("x")

    rows = {"a": fails, "b": half, "c": lambda failed: a_row("x")}
    found = part.measured(setting, rows, 60)
    assert found == ["a: ValueError: no such thing", "b by triton: RuntimeError: out of resources"]
    setting.done.append("c")
    assert part.measured(setting, {"c": fails}, 60) == []
    lines = run.Lines(setting.lines)
    assert [x["row"]["name"] for x in lines.new() if "row" in x] == ["b", "c"]
    assert list(lines.new()) == []


def test_a_lost_gpu_ends_the_process_and_names_who_lost_it(setting, monkeypatch):
    monkeypatch.setattr(setting, "device", "cuda")
    monkeypatch.setattr(part, "why_lost", lambda: "illegal memory access")

    def lose(failed):
        failed.update(cuda=RuntimeError("first"), triton=RuntimeError("second"))
        return a_row("x")

    with pytest.raises(SystemExit):
        part.measured(setting, {"a": lose, "b": lose}, 60)
    last = list(run.Lines(setting.lines).new())[-1]
    assert last == {"lost": "cuda", "why": "illegal memory access"}


# --- goals ------------------------------------------------------------------------------------


def test_goals_are_ratios_of_the_row():
    row = Row(
        "x", "x", "GB/s", 1.0, {"triton": [2.0] * 3, "cuda": [1.0] * 3, "torch cudnn": [1.5] * 3}
    )
    row.at_best, row.host = 0.5, {"cuda": 0.25}
    assert goals.bandwidth(0.9).measured(row).value == 0.5
    assert goals.faster(goals.CUDNN).measured(row).value == 1.5
    alone = goals.triton_alone(goals.CUDNN, 0.8).measured(row)
    assert alone.value == 0.75 and not alone.holds
    assert goals.host_time().measured(row).value == 0.25
    assert goals.faster(goals.COMPILED).measured(row).value is None
    config, rows = TINY.config, 8
    row.memory["cuda"] = 2 * (config.dim * (rows + config.vocab_size) + rows * config.vocab_size)
    assert goals.memory_of_logits(config, rows, 0.05).measured(row).value == pytest.approx(1.0)


def test_every_target_of_the_table_has_a_row():
    """The project's targets on GPUs: what must be reached, by how much."""
    wanted = {
        ("memory_bound", "of bandwidth", 0.95), ("memory_bound", "× torch.compile", 1.0),
        ("memory_bound", "of bandwidth", 0.88),
        ("memory_bound", "of the kernel's time on the host", 1.0),
        ("attention", "× torch cudnn", 1.0), ("attention", "× torch cudnn, Triton alone", 0.8),
        ("attention", "× torch cudnn, Triton alone", 0.77),
        ("attention_decode", "of bandwidth", 0.90),
        ("loss", "× torch.compile", 1.0), ("loss", "of the logits' memory", 0.05),
    }  # fmt: skip
    found = {
        (kind, target.what, target.needed)
        for kind, calls in ops.CALLS.items()
        for call in calls(LARGE)
        for target in call.targets
    }
    assert found == wanted
    large = ops.memory_bound(LARGE)[0]
    assert large.work.tokens * LARGE.config.dim * 2 >= 64e6


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from benchmarks.gpu.__main__ import main as command

    assert command(["--parts", "graph"]) == 2
    assert "torch finds no GPU here; --device cpu rehearses" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--parts", "nothing"])
