"""Keeping freed memory in the process: a large, free gain on the CPU.

The C library hands big blocks back to the system as soon as they are freed; every large activation then costs a page
fault per 4 kB at every step. Three settings of glibc's malloc keep them. The price is that the process stays as large
as it once was, until `give_back`. The command line sets this up at its start, and whatever trains on the CPU does so
when it is built; `CUTLAYER_KEEP_MEMORY=0` switches it off.

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
    """Set the allocator up, once; whether it is. Does nothing off Linux and glibc, or where it is switched off."""
    return os.environ.get("CUTLAYER_KEEP_MEMORY", "1") != "0" and _set_up()


def give_back() -> None:
    """Hand the memory that is free now back to the system, if it was kept: training is over."""
    libc = _libc()
    if libc is not None and keep_memory():
        libc.malloc_trim(0)


def share_with(processes: int) -> None:
    """This process is one of so many that compute side by side."""
    global _processes
    _processes = processes


def sharing() -> int:
    """How many processes compute side by side, this one included."""
    return _processes


def free_memory() -> int | None:
    """Bytes that programs can still take: what the system has available, and what its control groups leave to this
    process. None where the system does not tell.
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
    """glibc; None where it is not."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
