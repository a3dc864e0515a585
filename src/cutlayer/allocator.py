"""Keeping freed memory in the process: a large, free gain on the CPU.

The C library hands big blocks back to the system as soon as they are freed; every large activation then costs a page
fault per 4 kB at every step. Three settings of glibc's malloc keep them. The price is that the process stays as large
as it once was, until `give_back`. The command line sets this up at its start, and whatever trains on the CPU does so
when it is built; `CUTLAYER_KEEP_MEMORY=0` switches it off.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# From malloc.h: their numbers are part of glibc's interface.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Set the allocator up, once; whether it is. Does nothing off Linux and glibc, or where it is switched off."""
    return os.environ.get("CUTLAYER_KEEP_MEMORY", "1") != "0" and _set_up()


def give_back() -> None:
    """Hand the memory that is free now back to the system, if it was kept: training is over."""
    libc = _libc()
    if libc is not None and keep_memory():
        libc.malloc_trim(0)


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
