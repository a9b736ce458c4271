"""`pytest benchmarks/`: options, and what pytest-benchmark's JSON says besides the times.

Each benchmark's `extra_info` has what a call must move and compute, the ceiling that bounds it, its
error against float64, and from the median bytes and FLOPs a second and the part of that ceiling;
`machine_info` has the ceilings, the processor and the versions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from llama_fast import ceilings, machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llama_fast")
    group.addoption("--shapes", default="1b", help="models whose sizes the ops get: 1b,8b …")
    group.addoption("--tokens", type=int, default=64, help="of a prefill")
    group.addoption("--keys", type=int, default=8192, help="that a decoded token sees")
    group.addoption("--threads", type=int, help="CPU threads; else all cores")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


@functools.cache
def measured_ceilings() -> ceilings.Ceilings:
    return ceilings.measure("cpu")


@pytest.fixture(scope="session")
def limits() -> ceilings.Ceilings:
    return measured_ceilings()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    found = measured_ceilings()
    machine_info["llama_fast"] = {
        **machine.describe(found.isa),
        "ceilings": dataclasses.asdict(found),
        "versions": machine.versions("pytest-benchmark", "triton"),
    }


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict[str, Any]
) -> None:
    for entry in output_json["benchmarks"]:
        info, median = entry["extra_info"], entry["stats"]["median"]
        if "bytes" in info:
            info["gigabytes_per_second"] = info["bytes"] / median / 1e9
            info["teraflops"] = info["flops"] / median / 1e12
        if info.get("seconds_at_ceiling") is not None:
            info["part_of_ceiling"] = info["seconds_at_ceiling"] / median
