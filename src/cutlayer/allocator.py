"""Keeps freed memory in the process, which makes training on the CPU much faster.

The C library returns big blocks to the system as soon as they are freed; every large activation then costs a page fault
per 4 kB at every step. Three settings of glibc's malloc keep them. The price is that the process keeps its largest size
until `give_back`. The command line sets this up at its start, and everything that trains on the CPU does so when it is
built; `CUTLAYER_KEEP_MEMORY=0` switches it off.

Also here: how much memory is free, and with how many other processes this one shares it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

# From malloc.h: their numbers are part of glibc's interface.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_processes = 1


def keep_memory() -> bool:
    """Set the allocator up, once. Returns whether it is set up. Does nothing without Linux and glibc, or if it is
    switched off.
    """
    return os.environ.get("CUTLAYER_KEEP_MEMORY", "1") != "0" and _set_up()


def give_back() -> None:
    """Return free memory to the system, if it was kept, after training."""
    libc = _libc()
    if libc is not None and keep_memory():
        libc.malloc_trim(0)


def share_with(processes: int) -> None:
    """This process is one of this number that compute at the same time."""
    global _processes
    _processes = processes


def sharing() -> int:
    """The number of processes that compute at the same time, including this one."""
    return _processes


def free_memory() -> int | None:
    """Bytes that programs can still use: the available memory of the system, and the limits of its control groups for
    this process. None if the system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*available, *_left_by_groups()])) if available else None


def _left_by_groups() -> list[int]:
    """Bytes that the process's control group (version 2), and each above it, leaves."""
    root = Path("/sys/fs/cgroup")
    try:
        own = [line for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines() if line[:3] == "0::"]
        group = root / own[0][3:].lstrip("/") if own else root
        found = [_left(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    except (OSError, ValueError):
        return []
    return [left for left in found if left is not None]


def _left(group: Path) -> int | None:
    """Bytes that a control group has left; pages of files, which it can drop, do not count as used."""
    limit = group / "memory.max"
    if not limit.exists() or (most := limit.read_text(encoding="utf-8").strip()) == "max":
        return None
    used = int((group / "memory.current").read_text(encoding="utf-8"))
    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return int(most) - used + files


@cache
def _set_up() -> bool:
    libc = _libc()
    if libc is None:
        return False
    done = [libc.mallopt(_MMAP_MAX, 0), libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1), libc.mallopt(_TOP_PAD, 64 << 20)]
    return all(done)


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
