"""What was measured on: the processor, the GPUs, and the versions of what took part."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(isa: str | None) -> dict[str, Any]:
    """The machine as results files name it: JSON values only.

    isa  the instruction set that our kernels use, as the peak rates name it
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


def file_name(found: dict[str, Any], threads: int, device: str = "cpu") -> str:
    """A stem for its results: intel-xeon-gold-6330-cpu-2.00ghz-avx512-vnni-2-threads, nvidia-h200.

    threads  of the CPU, where it was that which was measured
    """
    if device != "cpu":
        index = int(device.partition(":")[2] or 0)
        return re.sub(r"[^a-z0-9.]+", "-", found["gpus"][index].lower()).strip("-")
    cpu = re.sub(r"\((?:r|tm)\)", "", found["cpu"].lower())
    kinds = ("amx_bf16", "avx512_bf16", "avx512_vnni")
    if not (found["isa"] or "").startswith("avx512"):
        kinds = ()  # it may be held to less than the CPU has
    kind = next((flag for flag in kinds if flag in found["flags"]), found["isa"] or "")
    words = f"{cpu} {kind} {threads} threads"
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")


def versions(*packages: str) -> dict[str, Any]:
    """Of this package and its commit, Python and torch, and of `packages` too; None for what is not
    installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "commit": _commit()}
    for package in ("llama_fast", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """Of the repository whose file this is, and whether it has changes; None where it is none's."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        known = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:
        return None
    if known.returncode or head.returncode:
        return None
    return head.stdout.decode().strip() + (" with changes" if changed.stdout else "")
