"""The process of one part: it writes what it finds as it goes, and ends when the GPU is lost."""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from llama_fast.bench.results import OURS, OWN, Row
from llama_fast.dispatch import backends

from .parts import PARTS
from .setting import Setting, kernels

LOST = 3  # the exit code of a process whose GPU answers nothing any more


def enter(file: str, log: str) -> None:
    """What a part's process runs: `run_part` in a group of processes of its own, of which all that
    is said goes to the end of `log`."""
    os.setsid()
    with open(log, "a", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # what is killed has said what it did
    sys.exit(run_part(Path(file)))


def run_part(file: Path) -> int:
    """Runs the part that `Setting.save` has described; its failures go to stdout."""
    setting, part = Setting.load(file)
    module, _, function = PARTS[part].runs.partition(":")
    run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    backends()  # declares the ops
    torch.manual_seed(0)
    with kernels(setting):
        takes_part = len(inspect.signature(run).parameters) == 2
        failures = run(setting, part) if takes_part else run(setting)
    for line in failures:
        print(line)
    return 1 if failures else 0


def measured(
    setting: Setting, rows: dict[str, Callable[[dict[str, Exception]], Row]], patience: float
) -> list[str]:
    """Measures the rows, by name, that are not done; returns what failed, in sentences.

    A row is a function that takes a dict for the exceptions of baselines that it leaves out, of
    which those of our own fail. Where the GPU is lost, the baseline that failed first is named,
    and the process ends; so it does, with a traceback, where a row takes more seconds than
    `patience`.
    """
    failures = []
    for name, measure in rows.items():
        if name in setting.done:
            continue
        failed: dict[str, Exception] = {}
        setting.write(begun=name)
        faulthandler.dump_traceback_later(patience, exit=True)
        try:
            row = measure(failed)
            row.name = name
            setting.write_row(row)
        except Exception as error:  # the other rows still run
            failures.append(f"{name}: {said(error)}")
        faulthandler.cancel_dump_traceback_later()
        failures += [
            f"{name} by {who}: {said(error)}"
            for who, error in failed.items()
            if who in OWN or who.startswith(OURS)
        ]
        if setting.gpu and (lost := why_lost()):
            print("\n".join(failures))
            setting.write(lost=next(iter(failed), None), why=lost)
            sys.exit(LOST)
        setting.write(ended=name)
    return failures


def said(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 400 else f"{text[:300]} … {text[-90:]}"


def why_lost() -> str:
    """Why the GPU of this process can no longer be used, as after a kernel that read what is not
    its own; or nothing."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return said(error)
    return ""
