"""Hardware counters of this process around some work: cycles, instructions, cache misses.

Linux's perf_event_open(2) without the perf tool: a counter for each thread that exists when the
work starts, user space alone, summed up. Where more are asked for than the processor has, the
kernel takes turns, and the counts are scaled by the part of the time that each was on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
# perf_event_open's number on the architectures that have one in common use.
SYSCALL = {"x86_64": 298, "aarch64": 241}
HARDWARE, SOFTWARE, CACHE = 0, 1, 3


class Event(NamedTuple):
    """A type and a number of linux/perf_event.h."""

    type: int
    config: int


EVENTS = {
    "cycles": Event(HARDWARE, 0),
    "instructions": Event(HARDWARE, 1),
    "branch misses": Event(HARDWARE, 5),
    # level | operation << 8 | result << 16: misses of reads
    "L1 data misses": Event(CACHE, 0 | 0 << 8 | 1 << 16),
    "last-level misses": Event(CACHE, 2 | 0 << 8 | 1 << 16),
    "TLB misses": Event(CACHE, 3 | 0 << 8 | 1 << 16),
    "page faults": Event(SOFTWARE, 2),
    "task clock": Event(SOFTWARE, 1),
}
# struct perf_event_attr: its size, where its flags are, and those that are set.
SIZE, FLAGS_AT, READ_FORMAT_AT = 128, 40, 32
DISABLED, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
TIMES = 1 << 0 | 1 << 1  # a read gives the time that it was enabled, and that it ran
ENABLE, DISABLE = 0x2400, 0x2401  # ioctl


class Counters:
    """Inside the block, counts.

    counts   afterwards: by name; page faults, and task clock in nanoseconds, among them
    missing  why names of EVENTS are not among the counts: sentences by name
    """

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self._open: list[tuple[str, int]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Counters:
        for name, event in EVENTS.items():
            try:
                for thread in _threads():
                    self._open_for(name, event, thread)
            except OSError as error:
                self.missing[name] = why(error)
        for _, descriptor in self._open:
            control(descriptor, ENABLE)
        return self

    def __exit__(self, *exception: object) -> None:
        for _, descriptor in self._open:
            control(descriptor, DISABLE)
        for name, descriptor in self._open:
            if name not in self.missing:
                count = read(descriptor)
                self.counts[name] = self.counts.get(name, 0.0) + count
        self._stack.close()

    def _open_for(self, name: str, event: Event, thread: int) -> None:
        try:
            descriptor = open_event(event, thread)
        except ProcessLookupError:  # the thread has ended meanwhile
            return
        self._stack.callback(os.close, descriptor)
        self._open.append((name, descriptor))

    @property
    def instructions_per_cycle(self) -> float | None:
        cycles, instructions = self.counts.get("cycles"), self.counts.get("instructions")
        return instructions / cycles if cycles and instructions is not None else None


def _threads() -> list[int]:
    """Of this process."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]  # the calling thread


def open_event(event: Event, thread: int) -> int:
    """A file descriptor that counts; raises OSError."""
    number = SYSCALL.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    attributes = bytearray(SIZE)
    struct.pack_into("=IIQ", attributes, 0, event.type, SIZE, event.config)
    struct.pack_into("=Q", attributes, READ_FORMAT_AT, TIMES)
    flags = DISABLED | EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR
    struct.pack_into("=Q", attributes, FLAGS_AT, flags)
    buffer = (ctypes.c_char * SIZE).from_buffer(attributes)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(ctypes.c_long(number), buffer, thread, -1, -1, ctypes.c_ulong(0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def control(descriptor: int, request: int) -> None:
    import fcntl  # not on Windows, which has no such counters either

    fcntl.ioctl(descriptor, request, 0)


def read(descriptor: int) -> float:
    count, enabled, ran = struct.unpack("=QQQ", os.read(descriptor, 24))
    return count * enabled / ran if ran else 0.0


def why(error: OSError) -> str:
    """Why a counter cannot be opened, and what to do."""
    if error.errno in (errno.EACCES, errno.EPERM):
        level = PARANOID.read_text().strip() if PARANOID.exists() else "unknown"
        return (
            f"the kernel does not let this process count (kernel.perf_event_paranoid is {level}): "
            "sudo sysctl kernel.perf_event_paranoid=2, or run with the capability CAP_PERFMON; "
            "where that is allowed already, a container's seccomp profile forbids it: "
            "docker run --cap-add PERFMON --security-opt seccomp=unconfined"
        )
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return (
            "this machine shows no such counter: virtual machines often hide the processor's; "
            "run on the machine itself, or on one whose host gives its counters to the guest"
        )
    if error.errno == errno.ENOSYS:
        return "counters are read through Linux's perf_event_open, which is not here"
    return f"perf_event_open: {error.strerror}"
