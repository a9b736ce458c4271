"""The resident memory that work takes at its peak, beyond what its process held before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Each in a fork of a process that has imported what it needs. The pages of libraries are not those
# of a fork until it uses them, so the work is done on something small first.
_FORKS = """
import os, sys
from llama_fast.utils.memory import resident_peak

def small(name):
    return name + " small" if os.sep in name else name

for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    if not (child := os.fork()):
        work(small(source), small(target))
        before = resident_peak()
        work(source, target)
        print(resident_peak() - before, flush=True)
        os._exit(0)
    assert not os.waitpid(child, 0)[1]
"""


def peaks(work: str, asked: Sequence[tuple[Path, Path | str]]) -> list[int]:
    """Bytes that each of the calls `work(source, target)` takes, one after the other.

    work   Python that defines it, with what it imports
    asked  folders, and other words as targets. Beside a folder to read lies a small one, "NAME
           small"; of a folder to write a small one is written too
    """
    command = [sys.executable, "-c", work + _FORKS, *(each for pair in asked for each in pair)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]
