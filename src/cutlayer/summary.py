"""Means and spreads of a few values, usually over seeds. If one value is not known, neither is the mean."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Literal

Correction = Literal["none", "holm"]
"""The correction of the p values of several comparisons: see `paired.holm`."""


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean; None if there is no value, or one is not known."""
    found = list(values)
    known = [v for v in found if v is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None if there are too few values."""
    found = list(values)
    return statistics.fmean(found) if found else None, statistics.stdev(found) if len(found) > 1 else None
