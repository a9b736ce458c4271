"""The command that profiles a step's kernels with Nsight Compute.

Sections and options are those of `ncu --list-sections` and its manual ("Nsight Compute CLI"). The
step runs under `llama-fast profile --bare`: torch's own profiler and ncu cannot both be there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

# What every kernel is asked for.
COMMON = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats",
          "SourceCounters")  # fmt: skip
# And what tells where the time goes, of kernels that move data and of those that multiply.
MEMORY = ("SpeedOfLight_RooflineChart", "MemoryWorkloadAnalysis",
          "MemoryWorkloadAnalysis_Chart", "MemoryWorkloadAnalysis_Tables")  # fmt: skip
PRODUCT = ("SpeedOfLight_HierarchicalTensorRooflineChart", "ComputeWorkloadAnalysis",
           "InstructionStats", "MemoryWorkloadAnalysis")  # fmt: skip
LAUNCHES = 3  # of them are profiled


def command(
    program: list[str], kernels: list[str], *, products: bool, skip: int, report: str
) -> list[str]:
    """Profiles some launches of `kernels` (names of functions) in `program`.

    products  whether matrix products are among the kernels
    skip      launches of them that are left out first: those of a step that warms up
    report    the file, without .ncu-rep
    """
    sections = [*COMMON, *MEMORY]
    if products:
        sections += [section for section in PRODUCT if section not in sections]
    return [
        "ncu",
        "--kernel-name",
        f"regex:^({'|'.join(sorted(set(kernels)))})$",
        *("--launch-skip", str(skip), "--launch-count", str(LAUNCHES)),
        *(part for section in sections for part in ("--section", section)),
        *("--import-source", "yes"),
        *("--export", report, "--force-overwrite"),
        *program,
    ]


def find_ncu() -> Path | None:
    """ncu on PATH, or where NVIDIA's installers put it; the newest of those."""
    if found := shutil.which("ncu"):
        return Path(found)
    places = [*Path("/usr/local").glob("cuda*/bin/ncu"),
              *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]  # fmt: skip
    return max(places, default=None)
