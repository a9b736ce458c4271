"""A report is made of results, and says what they say; figures are drawn for what there is."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest

from llama_fast.bench import results
from llama_fast.bench.report import choose, figures, fill, write
from llama_fast.bench.results import Goal, Results, Row
from llama_fast.cli import main
from llama_fast.errors import LlamaFastError, ResultsError

WHERE = {"cpu": "Some CPU", "isa": "avx2", "flags": [], "cores": 2}
ROOFLINE = {"device": "cpu", "threads": 2, "isa": "avx2", "read": 2e10, "copy": 1.8e10,
            "float32": 2e11, "bfloat16": 2e11}  # fmt: skip
RUN = {"date": "2026-01-02", "threads": 2, "roofline": ROOFLINE, "versions": {"torch": "9.9"}}


def a_call(op: str, work: str, seconds: dict[str, float], keys: int = 64, **more) -> Row:
    name = f"{op}, 1b, {work}, {keys}"
    call = {"op": op, "problem": op, "shape": "1b", "work": work, "batch": 1, "tokens": 1,
            "keys": keys, "dtype": "bfloat16", "pass": "forward", "warm": False}  # fmt: skip
    given = {"bytes": 10**6, "flops": 10**7, "bound": "read", "at_best": 5e-5, **more}
    samples = {who: [s, s, s * 1.001] for who, s in seconds.items()}
    return Row(name, name, "GB/s", 1e-3, samples, call=call, measured_with=RUN, **given)


def all_rows() -> list[Row]:
    rows = [
        a_call("rms_norm", "prefill", {"cpu": 1e-4, "eager": 5e-4, "torch": 2e-4}),
        a_call("swiglu", "decode", {"cpu": 1e-4, "eager": 5e-4}, memory={"cpu": 10**7}),
    ]
    for keys in (1024, 2048, 4096):
        rows.append(a_call("attention", "decode", {"cpu": keys * 1e-7, "eager": 1e-2}, keys))
    noisy = Row("decode bf16", "decode of one sequence", "tok/s", 8.0, measured_with=RUN)
    noisy.samples = {"llama_fast": [0.2, 0.2, 0.4], "peer": [0.4, 0.4, 0.4]}
    noisy.goals = [Goal("× peer", 1.5, 2.0), Goal("of read", 0.9, 0.5), Goal("x", 1.0, None)]
    return [*rows, noisy]


@pytest.fixture
def found():
    return Results(WHERE, {row.name: row for row in all_rows()})


def test_the_page_says_what_was_measured(found, tmp_path):
    made = write([found], tmp_path / "report")
    text = made.page.read_text()
    assert "## Some CPU, avx2, 2 threads, 2026-01-02" in text and "torch 9.9" in text
    assert "read 20 GB/s" in text and "float32 200 GFLOP/s" in text
    # 1 MB in 100 µs is 10 GB/s, half of the read peak rate, five times eager.
    line = "| rms_norm, 1b, prefill, 64 | cpu | 100.0 µs | 0% | 10.0 | 100.0 | 50% read | 5.00 |"
    assert line in text
    goals = "2.00 × peer (goal ≥ 1.5), 0.50 of read (goal ≥ 0.9: missed)"
    line = f"| decode of one sequence | 40 tok/s | peer 20 | {goals} — too noisy to count |"
    assert line in text
    for figure in made.figures:
        assert f"]({figure.name})" in text
    kinds = {figure.name.removeprefix("some-cpu-avx2-2-threads-") for figure in made.figures}
    assert kinds == {f"{kind}.png" for kind in figures.FIGURES}
    for figure in made.figures:
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size < 100_000


def test_a_later_file_replaces_rows_and_machines_are_apart(found, tmp_path):
    newer = Results(WHERE, {"decode bf16": found.rows["decode bf16"]})
    newer.rows["decode bf16"].samples = {"llama_fast": [0.1] * 3, "peer": [0.4] * 3}
    other = Results({**WHERE, "cpu": "Other CPU"}, found.rows)
    text = write([found, newer, other], tmp_path, figures=False).page.read_text()
    assert text.count("## ") == 2 and "80 tok/s" in text and "too noisy to count |" not in text


def test_a_gpu_is_named_and_words_are_no_rows(found, tmp_path):
    run = {"date": "2026-01-02", "roofline": {**ROOFLINE, "device": "cuda", "threads": 0}}
    row = a_call("rms_norm", "training", {"triton": 1e-4, "eager": 5e-4})
    row.measured_with = run
    said = Row("part graph", "part graph", "", notes=["done"], measured_with={"date": "2026-01-02"})
    where = {**WHERE, "gpus": ["NVIDIA H200"]}
    made = write([Results(where, {"a": row, "b": said})], tmp_path)
    assert "## NVIDIA H200, 2026-01-02" in made.page.read_text()
    assert {path.name for path in made.figures} >= {"nvidia-h200-roofline.png"}


def test_a_figure_without_rows_is_left_out(found, tmp_path):
    few = Results(WHERE, {"decode bf16": found.rows["decode bf16"]})
    made = write([few], tmp_path)
    assert [path.stem.rpartition("-")[2] for path in made.figures] == ["models"]
    with pytest.raises(ResultsError, match="no rows"):
        write([Results(WHERE, {})], tmp_path)


def test_the_roofline_shows_each_kernel_at_its_place(found):
    axes = figures.roofline(all_rows(), "title").axes[0]
    points = {
        (round(line.get_xdata()[0], 3), round(line.get_ydata()[0], 3))
        for line in axes.lines
        if line.get_marker() in figures.MARKERS.values()
    }
    assert (10.0, 100.0) in points  # FLOPs a byte, GFLOP/s
    assert {text.get_text() for text in axes.texts} == {
        "memory read 20 GB/s",
        "float32 and bfloat16 multiply-add 200 GFLOP/s",
    }
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"rms_norm", "swiglu", "attention", "prefill", "decode"} <= set(said)


def test_bars_are_ratios_and_noise_is_marked():
    axes = figures.speed_ups(all_rows(), "title").axes
    labels = [text.get_text() for text in axes[1].texts]
    assert axes[1].get_title() == "prefill" and labels == ["5", "2"]  # eager, torch
    (panel,) = figures.models(all_rows(), "title").axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["decode bf16 ~"]


def test_a_sweep_needs_three_lengths_and_the_others_show_the_longest():
    rows = all_rows()
    assert [row.call["keys"] for row in choose.sweeps(rows)[0]] == [1024, 2048, 4096]
    assert choose.sweeps(rows[:4]) == []
    assert [r.call["keys"] for r in choose.calls(rows) if r.call["op"] == "attention"] == [4096]


PAGE = """before
<!-- figures of some-cpu-avx2-2-threads -->
<!-- rms_norm, 1b, prefill: × eager -->old<!-- end --> × eager
<!-- decode bf16: ours --><!-- end -->
<!-- figures of another -->
<!-- decode bf16: ours -->stays<!-- end -->
after
"""


def test_the_command_writes_pages_in_two_places(found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    results.save(Path("r.json"), WHERE, list(found.rows.values()))
    name = next(name for name, row in found.rows.items() if row.call.get("op") == "rms_norm")
    readme = tmp_path / "README.md"
    readme.write_text(PAGE.replace("rms_norm, 1b, prefill", name))
    assert main(["report", "r.json", "--out", "docs/figures", "--write", "README.md"]) == 0
    assert "docs/figures/report.md: 5 figures" in capsys.readouterr().out
    text = readme.read_text()
    assert text == PAGE.replace("rms_norm, 1b, prefill", name).replace("old", "5.0").replace(
        "<!-- decode bf16: ours --><!-- end -->", "<!-- decode bf16: ours -->40 tok/s<!-- end -->"
    )
    assert main(["report", "r.json", "--no-figures", "--write", "README.md"]) == 0
    assert readme.read_text() == text, "again and again the same"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marks", "has no place for a figure; write one as <!-- decode bf16: × "),
        ("<!-- nothing: ours --><!-- end -->", "have no row 'nothing'; they have attention"),
        ("<!-- decode bf16: × vllm --><!-- end -->", "'decode bf16' has no 'vllm'; it has ours, "),
    ],
)
def test_a_page_that_cannot_be_filled_stays_as_it_is(found, tmp_path, text, message):
    page = tmp_path / "page.md"
    text = f"<!-- figures of some-cpu-avx2-2-threads -->{text}"
    page.write_text(text)
    with pytest.raises(ResultsError, match=re.escape(message)):
        fill(page, [found])
    assert page.read_text() == text


def test_bars_beside_our_own_definition_say_so():
    rows = all_rows()
    axes = figures.speed_ups(rows, "title").axes
    assert "dequantises" not in axes[-1].get_xlabel()
    row = a_call("linear_quantized", "decode", {"cpu": 1e-4, "eager": 5e-3})
    axes = figures.speed_ups([*rows, row], "title").axes
    names = [tick.get_text() for panel in axes for tick in panel.get_yticklabels()]
    assert [name for name in names if "†" in name] == ["linear_quantized †"]
    assert "† PyTorch has no such op: beside our own definition" in axes[-1].get_xlabel()


def test_without_matplotlib_the_tables_are_still_to_be_had(found, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LlamaFastError, match=r"pip install 'llama_fast\[report\]'"):
        write([found], tmp_path)
    assert write([found], tmp_path, figures=False).figures == []


def test_no_two_baselines_look_alike():
    names = ["triton", "cuda", "llama_fast cuda overlap", "transformers", "eager", "llama.cpp q4_0"]
    found = figures.colours_of(names)
    assert len(set(found.values())) == len(names)
    assert found["cuda"] == figures.COLOURS[0] != found["transformers"]


def test_models_of_several_sizes_are_told_apart():
    rows = [a_call("swiglu", "prefill", {"cpu": 1e-4, "eager": 5e-4}) for _ in "ab"]
    assert choose.labels(rows[:1]) == {rows[0].name: "swiglu"}
    rows[1].call["shape"], rows[1].name = "8b", "other"
    assert list(choose.labels(rows).values()) == ["swiglu 1b", "swiglu 8b"]


def test_lengths_of_as_many_tokens_are_a_sweep():
    rows = []
    for batch, tokens in ((8, 2048), (4, 4096), (2, 8192)):
        row = a_call("attention", "training", {"triton": 1e-4}, keys=tokens)
        row.call |= {"batch": batch, "tokens": tokens}
        rows.append(row)
    (sweep,) = choose.sweeps(rows)
    assert [row.call["tokens"] for row in sweep] == [2048, 4096, 8192]


def test_results_in_words_and_memory_of_models_are_shown(tmp_path):
    said = Row("part tests", "part tests", "", notes=["FAILED after 3 s"], measured_with=RUN)
    model = Row("patched decode", "patched decode", "tok/s", 1.0, measured_with=RUN)
    model.samples = {"cuda": [0.01] * 3, "triton": [0.02] * 3, "transformers": [0.05] * 3}
    model.memory, model.goals = {"cuda": 2 * 10**9}, [Goal("× transformers", 2.5, 5.0)]
    made = write([Results(WHERE, {"a": said, "b": model})], tmp_path, figures=False)
    text = made.page.read_text()
    assert "- part tests: FAILED after 3 s" in text
    assert "| 100 tok/s, 2 GB (cuda) | triton 50, transformers 20 |" in text
