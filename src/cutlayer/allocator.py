"""Keeping freed memory in the process: a large, free gain on the CPU.

The C library hands big blocks back to the system as soon as they are freed; every large activation then costs a page
fault per 4 kB at every step. Three settings of glibc's malloc keep them. The price is that the process stays as large
as it once was. The command line does this at start; `CUTLAYER_KEEP_MEMORY=0` switches it off.
"""

from __future__ import annotations

import ctypes
import os
import sys

# From malloc.h: their numbers are part of glibc's interface.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Set the allocator up; whether it is. Does nothing off Linux and glibc, or where it is switched off."""
    if os.environ.get("CUTLAYER_KEEP_MEMORY", "1") == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = [libc.mallopt(_MMAP_MAX, 0), libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1), libc.mallopt(_TOP_PAD, 64 << 20)]
    except (OSError, AttributeError):
        return False
    return all(done)
