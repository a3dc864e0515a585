"""A job for other processes that needs no torch, so they start quickly."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Generator

from cutlayer.errors import CutlayerWarning, NonFiniteError


def counting(job: int) -> Generator[object, None, object]:
    """Yields its process number, and then counts, warns, fails or kills its process, depending on the job."""
    yield os.getpid()
    if job == 7:
        warnings.warn("seven", CutlayerWarning, stacklevel=1)
    if job == 13:
        try:
            raise ValueError("thirteen")
        except ValueError as error:
            raise NonFiniteError("loss", (1, 2)).at(13) from error
    if job == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job
