"""`make gpu` without a GPU: neither a kernel that fails nor one that kills its process or hangs
takes the other rows along, and what was tested is kept. Its rehearsal is in test_bare.py."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__, goals, ops, part, run, tests_apart
from benchmarks.gpu.__main__ import main as command
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import Ended
from benchmarks.gpu.setting import LARGE, TINY, Setting
from llama_fast.bench.results import Row
from llama_fast.bench.roofline import Roofline
from llama_fast.dispatch import OPS

pytest.importorskip("triton", reason="Triton is not installed: its kernels take part")
ROOFLINE = Roofline("cpu", 1, None, 1e9, 1e9, 1e9, 1e9)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", tmp_path / "lines.jsonl", tmp_path, ROOFLINE)


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


def hang_in_a_row(file: str, log: str) -> None:
    """In place of `part.enter`."""
    os.setsid()
    with open(log, "a") as said:
        os.dup2(said.fileno(), 2)
    found, _ = Setting.load(Path(file))
    rows = {"right": lambda failed: a_row("right"), "hangs": lambda failed: time.sleep(60)}
    part.measured(found, rows, 0.5)


def test_a_process_that_ends_in_a_row_says_which(setting):
    """A real one: a row that hangs is ended with a traceback, and what was measured is kept."""
    row, ended = run.start_process("attention", setting, 60.0, hang_in_a_row)
    assert row.name == "right" and ended.died and ended.culprit is None
    assert "its process ended at hangs" in ended.why and "Timeout (0:00:00.5" in ended.why
    (ended,) = run.start_process("attention", setting, 0.0, hang_in_a_row)
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


# --- the command ------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command(["--parts", "graph"]) == 2
    assert "torch finds no GPU here; --device cpu rehearses" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--parts", "nothing"], ["nothing"], ["checks", "--parts", "a"]])
def test_what_it_has_not_is_refused(wrong):
    with pytest.raises(SystemExit):
        command(wrong)


def test_each_call_takes_less_than_ten_minutes_and_begins_with_what_must_hold(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(__main__, "run_all", lambda *args: asked.append(args) or [])
    for stages in ([], ["kernels"], ["models"]):
        assert command(stages) == 0
        parts, _, seconds, _ = asked[-1]
        assert parts[0] == "build" and seconds <= 560
    assert "next: make gpu ARGS=kernels" in capsys.readouterr().out
    assert {part for parts, *_ in asked for part in parts} == set(PARTS)
    assert asked[0][0][1] == "tests" and "graph" in asked[0][0]
    assert command(["all"]) == 0 and set(asked[-1][0]) == set(PARTS)


# --- the tests that it runs -------------------------------------------------------------------

TESTS_OF_EACH_KIND = """
import time

import pytest


def test_right(): pass


def test_attention(): pass


def test_wrong():
    assert 1 == 2


@pytest.mark.skip("a reason")
def test_skipped(): pass
"""


def test_a_test_has_a_line_and_attention_is_first(setting, tmp_path, monkeypatch):
    (tmp_path / "test_kinds.py").write_text(TESTS_OF_EACH_KIND)
    select = tests_apart.Selection(str(tmp_path / "test_kinds.py"), "test", processes=2)
    failures = tests_apart.run_tests(setting, [select], "triton")
    assert len(failures) == 1 and "test_wrong: assert 1 == 2" in failures[0]
    lines = (tmp_path / tests_apart.TESTS).read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == ["failed", "passed", "passed", "skipped"]
    assert any("test_skipped" in line and line.endswith("a reason") for line in lines)
    *_, last = run.Lines(setting.lines).new()
    assert "1 failed, 2 passed, 1 skipped in " in last["row"]["notes"][0]
    (tmp_path / tests_apart.TESTS).unlink()
    tests_apart.run_tests(setting, [select._replace(processes=1)], "triton")
    assert "test_attention" in (tmp_path / tests_apart.TESTS).read_text().splitlines()[0]


def test_a_selection_that_is_killed_keeps_what_it_had(setting, tmp_path):
    tally = tests_apart.Tally(setting, "tests of x")
    tally.add("passed", 1.0, "a")
    tally.add("failed", 1.0, "b: wrong")
    *_, last = run.Lines(setting.lines).new()
    notes = last["row"]["notes"]
    assert notes[0].startswith("1 failed, 1 passed in ") and notes[0].endswith(" so far")
    assert notes[1:] == ["b: wrong"] and len((tmp_path / tests_apart.TESTS).read_text()) > 20


def test_cases_are_judged_where_there_is_no_pytest(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(tests_apart.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tests_apart, "OPS", {"swiglu": OPS["swiglu"]})
    assert tests_apart.run_tests(setting, [], "cpu") == []
    lines = (tmp_path / tests_apart.TESTS).read_text().splitlines()
    assert len(lines) > 10 and all(line.startswith("passed ") for line in lines)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def test_a(): os._exit(7)", "ended with code 7 in test_it.py::test_a"),
        ("def test_a(): os.kill(os.getpid(), 11)", "ended with code -11 in test_it.py::test_a"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("", "ended with code 5"),
    ],
)
def test_a_test_process_that_ends_otherwise_is_a_failure(setting, tmp_path, body, says):
    (tmp_path / "test_it.py").write_text(f"import os\n{body}\n")
    # Tests are named from there, wherever the checkout lies.
    options = f"--rootdir={tmp_path}"
    select = tests_apart.Selection(str(tmp_path / "test_it.py"), "test", options=options)
    (failure,) = tests_apart.run_tests(setting, [select], "triton")
    assert re.search(says, failure), failure
