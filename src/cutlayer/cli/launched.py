"""A command that `torchrun` or `srun` has started several times: its processes train together, and rank 0 prints."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from cutlayer.cli.merging import check_positive
from cutlayer.collective import TIMEOUT, Place, World, is_known, joined, place, world
from cutlayer.errors import ConfigError, CutlayerError, LostRankError

TOGETHER = (["run"], ["compare"], ["resume"])  # the commands that ranks run together


@contextmanager
def launched(timeout: float | None = None) -> Iterator[World]:
    """Inside, be one of the ranks, if there are several. A rank that does not answer for `timeout` seconds counts as
    lost. Ranks after the first only print their own errors. Raises ConfigError for a timeout that is not possible.
    """
    where = place()
    check_positive(rank_timeout=timeout)
    if where is None:
        if timeout is not None:
            raise ConfigError(
                f"rank_timeout = {timeout:g} has no effect on a single process: leave it out, or start several ranks "
                "with torchrun or srun"
            )
        yield world()
        return
    if where.rank:
        _fall_silent()
    signal.signal(signal.SIGTERM, lambda *_: _ended(where))
    with joined(where, timeout=timeout or TIMEOUT) as ranks:
        try:
            yield ranks
        finally:  # the error was already printed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fall_silent() -> None:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
    warnings.showwarning = lambda *_, **__: None


def _ended(where: Place) -> NoReturn:
    """A launcher ends all ranks when one is lost; it may do so before this one has noticed."""
    raise LostRankError(
        f"rank {where.rank} of {where.size} was told to end, as launchers do when another rank is lost: start the "
        "ranks again"
    )


def said_elsewhere(error: Exception, words: Sequence[str]) -> bool:
    """Whether rank 0 reports this error of a command line, because all ranks have it."""
    try:
        where = place()
    except ConfigError:
        return False
    follows = where is not None and where.rank > 0 and words[:1] in TOGETHER
    return follows and (is_known(error) or not isinstance(error, CutlayerError))
