"""A plugin for pytest: a line where a test begins and where it ends, the tests of attention first,
and with `--share I/N` one of N parts of them."""

from __future__ import annotations

import pytest

BEGINS, ENDS = "@begins", "@ends"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="I/N: the Ith of N parts, from 0 on")


@pytest.hookimpl(trylast=True)  # of those that -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ("attention" not in item.name, "bfloat16" not in item.name))
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = items[share::shares]


class Lines:
    def __init__(self, config: pytest.Config) -> None:
        self.writer = config.get_terminal_writer()

    def write(self, text: str) -> None:
        self.writer.write(f"\n{text}\n", flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(f"{BEGINS} {nodeid}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        text = f"{report.outcome} {report.duration:.2f} {report.nodeid}"
        if report.outcome == "failed":
            text += f": {one_line(report.longreprtext)}"
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            text += f": {one_line(report.longrepr[2])}"
        self.write(f"{ENDS} {text}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self.write(f"{ENDS} failed 0 {report.nodeid}: {one_line(report.longreprtext)}")


def one_line(text: str) -> str:
    """What went wrong: the first line that pytest marks, else the last."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    marked = [line.removeprefix("E") for line in lines if line.startswith("E ")]
    return (marked or lines[-1:])[0].strip()[:300]


@pytest.hookimpl(trylast=True)  # the terminal's own plugin is there
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lines(config))
