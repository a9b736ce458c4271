"""The regression guard sees what has slowed down, refuses what is wrong, and forgives a machine."""

from __future__ import annotations

import pytest

from benchmarks import check
from llama_fast.bench import machine, results, roofline
from llama_fast.bench.results import Row
from llama_fast.bench.shapes import Work
from llama_fast.dispatch import OPS, Implementation, backends

pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")


def row(cpu: float, eager: float = 10.0, at_best: float | None = 0.5, spread: float = 0.0) -> Row:
    samples = {"cpu": [cpu * (1 - spread), cpu, cpu * (1 + spread)], "eager": [eager] * 3}
    return Row("op", "op", "GB/s", 1.0, samples, at_best=at_best)


def test_what_has_slowed_down_is_seen():
    verdict = check.compare(row(1.0), row(1.5))
    assert verdict.slower and list(verdict.ratios.values()) == pytest.approx([1 / 1.5] * 2)
    assert "SLOWER: 0.67 × the part of the peak rate, 0.67 × the lead over eager" in str(verdict)
    assert not check.compare(row(1.0), row(1.2)).slower  # within the tolerance
    assert not check.compare(row(1.5), row(1.0)).slower


def test_absolute_times_are_not_looked_at():
    """A machine of half the speed has half the peak rates, too."""
    slow = row(2.0, eager=20.0, at_best=1.0)
    verdict = check.compare(row(1.0), slow)
    assert verdict.judged and not verdict.slower
    assert list(verdict.ratios.values()) == [1.0, 1.0]


def test_what_slows_the_machine_is_forgiven():
    """A neighbour that takes half of it, after the peak rates were measured: eager is as slow."""
    assert not check.compare(row(1.0), row(2.0, eager=20.0)).slower
    # A peak rate that came out too high, with a lead as it was.
    assert not check.compare(row(1.0), row(1.0, at_best=0.2)).slower


def test_one_ratio_serves_where_there_is_no_other():
    assert check.compare(row(1.0, at_best=None), row(2.0, at_best=None)).slower
    alone, slowed = row(1.0), row(2.0)
    for one in (alone, slowed):
        del one.samples["eager"]
    assert check.compare(alone, slowed).slower


def test_samples_that_spread_widen_the_tolerance():
    assert check.compare(row(1.0, spread=0.1), row(1.4)).slower
    assert not check.compare(row(1.0, spread=0.3), row(1.4)).slower
    verdict = check.compare(row(1.0), row(9.0, spread=0.9))
    assert not verdict.judged and "too noisy to judge" in str(verdict)


def test_the_best_of_three_attempts_counts():
    fresh = iter([row(3.0), row(1.0)])
    verdict = check.judge(row(1.0), lambda: next(fresh))
    assert not verdict.slower and next(fresh, None) is None
    fresh = iter([row(3.0), row(9.0, spread=0.9), row(2.0)])
    verdict = check.judge(row(1.0), lambda: next(fresh))
    assert verdict.slower and max(verdict.ratios.values()) == pytest.approx(0.5)


# --- the command, on real kernels -------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Results of rms_norm as it is, on this machine."""
    monkeypatch.setattr(check, "CHECKED", [("rms_norm", Work.prefill(64))])
    path = tmp_path / "results.json"
    found = roofline.measure("cpu")
    ((_, measure),) = check.measured(check.CHECKED, 3, False)
    row = measure()
    assert row.measured_with["roofline"]["isa"] == found.isa
    results.save(path, machine.describe(found.isa), [row])
    return path


@pytest.fixture
def change(monkeypatch):
    def put(changed) -> None:
        kernels = backends()["cpu"].implementations
        right = kernels["rms_norm"]
        monkeypatch.setitem(
            kernels, "rms_norm", Implementation(changed(right.launch), right.unsupported)
        )
        OPS["rms_norm"].forget_order()

    yield put
    monkeypatch.undo()
    OPS["rms_norm"].forget_order()


def run(path, *more: str) -> int:
    import torch

    arguments = ("--against", str(path), "--rounds", "3", *more)
    return check.main([*arguments, "--threads", str(torch.get_num_threads())])


def test_a_slowed_kernel_is_caught(recorded, change, capsys):
    def eight_times(launch):
        def slow(*args):
            for _ in range(7):
                launch(*args)
            return launch(*args)

        return slow

    change(eight_times)
    # Whether a row can be judged is the machine's to say; an eighth is beyond any tolerance.
    check_rows = run(recorded)
    out = capsys.readouterr()
    if "too noisy to judge" in out.out:
        pytest.skip("this machine is too busy for any measurement")
    assert check_rows == 1 and "SLOWER" in out.out and "rms_norm, 1b, prefill" in out.out


def test_a_wrong_kernel_is_refused(recorded, change, capsys):
    change(lambda launch: lambda *args: launch(*args) * 1.05)
    assert run(recorded) == 1
    said = capsys.readouterr().out
    assert f"compared with {recorded}, recorded on " in said
    assert "REFUSED: rms_norm (forward) by cpu is 0.0" in said and "1 of 1 rows are" in said


def test_what_is_missing_is_said(tmp_path, recorded, capsys):
    assert run(tmp_path / "none.json") == 2
    assert "to compare with: record some with" in capsys.readouterr().err
    assert run(recorded, "--rows", "conv") == 2
    assert "no row's name has all of conv" in capsys.readouterr().err
