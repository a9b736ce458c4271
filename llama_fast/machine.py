"""What was measured on: the processor, the GPUs, and the versions of what took part."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(isa: str | None) -> dict[str, Any]:
    """The machine as results files name it: JSON values only.

    isa  the instruction set that our kernels use, as the ceilings name it
    """
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            cpu = match[1]
        if match := re.search(r"^flags\s*:\s*(.+)$", text, re.M):
            flags = match[1]
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": isa,
        "flags": [flag for flag in flags.split() if re.match(r"avx|amx|fma|f16c", flag)],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return found


def file_name(found: dict[str, Any], threads: int) -> str:
    """A stem for its results: intel-xeon-gold-6330-cpu-2.00ghz-avx512-vnni-2-threads."""
    cpu = re.sub(r"\((?:r|tm)\)", "", found["cpu"].lower())
    kind = next((f for f in ("amx_bf16", "avx512_bf16", "avx512_vnni") if f in found["flags"]), "")
    words = f"{cpu} {kind or found['isa'] or ''} {threads} threads"
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")


def versions(*packages: str) -> dict[str, str | None]:
    """Of this package, Python and torch, and of `packages` too; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("llama_fast", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
