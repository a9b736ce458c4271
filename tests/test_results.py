"""Results files keep every sample, and say what they were measured with."""

from __future__ import annotations

import json

import pytest

from llama_fast.bench import results
from llama_fast.bench.results import Goal, Row
from llama_fast.errors import ResultsError

WHERE = {"cpu": "one", "isa": "avx9", "flags": []}


def test_goals_hold_or_not():
    assert Goal("× peer", 1.6, 1.6).holds and not Goal("× peer", 1.6, 1.59).holds
    assert Goal("µs", 5.0, 4.0, at_most=True).holds
    assert Goal("× peer", 1.6, None).holds is None
    assert str(Goal("µs", 5.0, 4.0, at_most=True)) == "≤ 5 µs"


def test_a_row_comes_back_from_its_file(tmp_path):
    row = Row(
        "decode", "decode of one sequence", "tok/s", 8.0, {"llama_fast": [0.5, 0.25], "x": [1.0]},
        others=0.01, goals=[Goal("× x", 1.6, 2.5), Goal("× y", 1.0, None)], missing={"y": "gone"},
        notes=["said"], call={"op": "linear"}, bytes=100, flops=7, bound="read", at_best=0.125,
        errors={"x": 0.5}, host={"x": 1e-6}, memory={"x": 9}, measured_with={"threads": 2},
    )  # fmt: skip
    path = tmp_path / "results.json"
    results.save(path, WHERE, [row])
    found = results.load(path)
    assert found.machine == WHERE and found.rows == {"decode": row}
    stored = json.loads(path.read_text())["rows"]["decode"]
    assert stored["medians"] == {"llama_fast": pytest.approx(8 / 0.375, rel=1e-5), "x": 8.0}
    assert stored["goals"][0]["holds"] is True and stored["goals"][0]["text"] == "≥ 1.6 × x"
    assert row.share("x") == 0.125 and row.own() == "llama_fast" and row.times("x", "y") is None


def test_a_run_updates_its_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / "results.json"
    first, second = {"date": "2026-01-01"}, {"date": "2026-02-02"}
    rows = [Row(name, "", "µs", None, {"op": [1.0, 2.0]}, measured_with=first) for name in "abc"]
    results.save(path, WHERE, rows)
    results.save(path, WHERE, [Row("b", "new", "µs", None, {"op": [3.0]}, measured_with=second)])
    found = results.load(path).rows
    assert found["a"].samples == {"op": [1.0, 2.0]} and found["b"].what == "new"
    assert found["a"].measured_with == first and found["b"].measured_with == second
    assert len(json.loads(path.read_text())["runs"]) == 2  # a run is kept once
    with pytest.raises(ResultsError, match="another machine"):
        results.save(path, {"cpu": "other"}, rows)
    assert len(results.load(path).rows) == 3


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"machine_info": {"llama_fast": {}}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"file\.json (holds no results|cannot be read)"):
        results.load(path)
    with pytest.raises(ResultsError, match="absent"):
        results.load(tmp_path / "absent.json")


def test_a_malformed_row_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {}, "runs": [{}], "rows": {"a": {"run": 0}}}))
    with pytest.raises(ResultsError, match="malformed"):
        results.load(path)


def test_noise_is_named():
    row = Row("x", "", "tok/s", 10.0, {"a": [1.0, 2.0, 3.0]}, others=0.5)
    assert row.too_noisy == [
        "the samples of a spread over 50% of their median",
        "other programs took 50% of the processors' time",
    ]
