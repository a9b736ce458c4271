"""The command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_fast.errors import LlamaFastError

from . import __doc__ as about
from .parts import PARTS, STAGES
from .run import FOLDER, run_all

SECONDS = 540.0  # of a stage: a call that may take ten minutes has time to end


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=about.splitlines()[0],
        epilog="; ".join(f"{name}: {', '.join(parts)}" for name, parts in STAGES.items()),
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)}, or all; else "
        "checks"
    )  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", help=f"instead of stages, some of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, help=f"for all together; else {SECONDS:.0f} each")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder; else {FOLDER}")
    given = parser.parse_args(arguments)
    stages = list(STAGES) if given.stages == ["all"] else given.stages or ["checks"]
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}, all")
    parts = list(dict.fromkeys(part for stage in stages for part in STAGES[stage]))
    if given.parts:
        if given.stages:
            parser.error("give stages or --parts, not both")
        stages, parts = [], given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    seconds = given.seconds or SECONDS * max(1, len(stages))
    try:
        failed = run_all(parts, given.device, seconds, given.out)
    except LlamaFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    later = [name for name in STAGES if name not in stages]
    if stages and later and given.device == "cuda":
        print(f"next: make gpu ARGS={later[0] if stages == ['checks'] else ' or '.join(later)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
