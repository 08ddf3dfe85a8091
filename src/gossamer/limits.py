"""What this process may use of the machine: threads and memory, within its control group.

A control group's limits hold for all groups below it, so every level from the process's own group up to the root is
read (cgroup v2; in a container the root is usually the container's own group).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory", "default_threads"]

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def _groups() -> Iterator[Path]:
    """The folders of the process's control group and of those above it."""
    own = ""
    with suppress(OSError):
        own = next((line[3:] for line in OWN.read_text().splitlines() if line.startswith("0::")), "")
    folder = ROOT / own.strip("/")
    while folder != ROOT and ROOT in folder.parents:
        yield folder
        folder = folder.parent
    yield ROOT


def default_threads() -> int:
    """Threads that are worth starting: the CPU affinity, capped by the groups' quotas, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups():
        try:
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                count = min(count, int(quota) // int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return max(1, count)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, within the groups' limits; None where that is unknown."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = MEMINFO.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for group in _groups():
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit == "max":
                continue
            used = int((group / "memory.current").read_text())
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Files that were read count as used, the model's own among them, but are given up when memory is short.
            used -= int(parts["active_file"]) + int(parts["inactive_file"])
            found.append(int(limit) - used)
        except (OSError, ValueError, KeyError):
            continue
    return max(0, min(found)) if found else None
