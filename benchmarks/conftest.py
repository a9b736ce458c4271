"""`pytest benchmarks/`: options, and how baselines that took turns become the plugin's benchmarks.

pytest-benchmark runs one test after the other, and a machine's speed drifts meanwhile. So the first
test of a group measures all of its baselines, round by round (`bench.measure`), and each test
then plays its own samples to the plugin: its clock is `replayed`, which every turn moves on by the
next sample. Comparison, histogram, JSON and --benchmark-compare-fail are the plugin's own.

`extra_info` has what a call must move and compute, GB/s, TFLOP/s, the peak rate that bounds it and
the part of it that was reached, the host's time, peak memory, the error against float64;
`machine_info` has the processor, and what is another in every run, the peak rates and the versions,
stands beside it: the plugin warns where the `machine_info` of two runs differ.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression

from llama_fast.bench import machine, roofline
from llama_fast.bench.results import Row

SHAPES, WORK, DTYPES = "1b,3b,8b,70b", "decode,prefill,training", "bfloat16,float16,float32"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llama_fast")
    group.addoption(
        "--shapes", help=f"models whose sizes the ops get, of {SHAPES} (1b); demo for a try"
    )
    group.addoption("--work", help=f"what a model is asked for, of {WORK} (all)")
    group.addoption("--dtypes", help=f"of the tensors, of {DTYPES} (bfloat16)")
    group.addoption("--full", action="store_true", help="all of these, and every matrix of a model")
    group.addoption("--tokens", type=int, default=64, help="of a prefill and of a training step")
    group.addoption("--keys", type=int, default=8192, help="that a decoded token sees")
    group.addoption("--layers", type=int, default=2, help="of the whole models; 0: all of them")
    group.addoption("--rounds", type=int, default=5, help="samples of each baseline")
    group.addoption("--device", default="cpu", help="cpu, or cuda")
    group.addoption("--threads", type=int, help="CPU threads; else all cores")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def chosen(config: pytest.Config, option: str, default: str, everything: str) -> list[str]:
    """The values of an option that takes several."""
    text = config.getoption(option) or (everything if config.getoption("--full") else default)
    return text.split(",")


@functools.cache
def measured_roofline(device: str) -> roofline.Roofline:
    return roofline.measure(device)


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> roofline.Roofline:
    return measured_roofline(pytestconfig.getoption("--device"))


def rivals(request: pytest.FixtureRequest) -> list[str]:
    """The baselines of this test's group that were selected, in the order of the tests."""
    group = request.node.callspec.params["case"].group
    cases = (getattr(item, "callspec", None) for item in request.session.items)
    cases = (spec.params["case"] for spec in cases if spec and "case" in spec.params)
    return [case.baseline for case in cases if case.group == group]


class _Clock:
    now = 0.0


def replayed() -> float:
    """The plugin's clock: seconds of the samples that have been played."""
    return _Clock.now


# What tests that report measured samples carry: @MEASURED.
MEASURED = pytest.mark.benchmark(timer=replayed)


def play(benchmark: Any, row: Row, baseline: str, group: str) -> None:
    """Hands a baseline's samples to pytest-benchmark, with all that is known of them."""
    samples = row.samples[baseline]
    upcoming = itertools.cycle(samples)
    _Clock.now = 0.0

    def turn() -> None:
        _Clock.now += next(upcoming)

    seconds, share, eager = (
        row.seconds(baseline), row.share(baseline), row.times("eager", baseline)
    )  # fmt: skip
    benchmark.group = group
    benchmark.extra_info.update(
        baseline=baseline,
        bytes=row.bytes,
        flops=row.flops,
        gigabytes_per_second=row.bytes / seconds / 1e9 if row.bytes else None,
        teraflops=row.flops / seconds / 1e12 if row.flops else None,
        bound=row.bound,
        part_of_peak=share,
        times_eager=eager,
        host_seconds=row.host.get(baseline),
        peak_memory_bytes=row.memory.get(baseline),
        error_against_float64=row.errors.get(baseline),
        too_noisy=row.too_noisy,
        row={**dataclasses.asdict(row), **NOT_OF_THE_ROW},
    )
    benchmark.pedantic(turn, rounds=len(samples))


# Each baseline's own, which its benchmark has; and the run's, which the file has.
NOT_OF_THE_ROW: dict[str, Any] = {
    key: {} for key in ("samples", "errors", "host", "memory", "measured_with", "missing")
}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary() -> Iterator[None]:
    """A regression ends the run with what the plugin says of it and code 1: the exception that it
    raises behind that would come out as a traceback of pytest itself."""
    try:
        return (yield)
    except PerformanceRegression as regression:
        pytest.exit(str(regression), returncode=1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    found = measured_roofline(config.getoption("--device"))
    machine_info["llama_fast"] = machine.describe(found.isa)
    for momentary in [key for key in machine_info["cpu"] if key.startswith("hz_actual")]:
        del machine_info["cpu"][momentary]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    found = measured_roofline(config.getoption("--device"))
    output_json["llama_fast"] = {
        "threads": torch.get_num_threads(),
        "roofline": dataclasses.asdict(found),
        "versions": machine.versions(
            "pytest-benchmark", "triton", "transformers", "liger-kernel", "flash-attn", "flashinfer"
        ),
    }
