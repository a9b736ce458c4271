"""The command; `--part` is how it starts each part's process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_fast.errors import LlamaFastError

from . import __doc__ as about
from .part import run_part
from .parts import PARTS
from .run import run_all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=about.splitlines()[0]
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument(
        "--json", type=Path, help="results; else those of this GPU (a rehearsal keeps none)"
    )
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part:
        return run_part(given.part)
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        return 1 if run_all(parts, given.device, given.seconds, given.json) else 0
    except LlamaFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
